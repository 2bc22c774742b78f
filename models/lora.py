"""Low-rank adapters (LoRA, arXiv 2106.09685): `y = W x + (alpha / rank) B A x` with W frozen.

`ModelConfig.lora_rank` switches them on. A is `lora_a` `(rank, inputs)`, B is `lora_b` `(outputs,
rank)`, which begins at zero, so that a model with adapters begins as the model without.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import ClassVar

from torch import Tensor, nn

from rondo.errors import UserError
from rondo.models.config import ModelConfig
from rondo.models.layers import Linear
from rondo.models.mixer import ChannelMixer, Mixer

PARTS = ("lora_a.weight", "lora_b.weight")


class AdaptedLinear(Linear):
    """A `Linear`, whose parameters it takes over, and its adapter."""

    optional_tensors: ClassVar = PARTS
    """A run with adapters may begin with a model without (`Decoder.optional_names`)."""

    def __init__(self, base: Linear, config: ModelConfig) -> None:
        nn.Module.__init__(self)
        self.inputs, self.outputs = base.inputs, base.outputs
        self.weight, self.bias = base.weight, base.bias
        self.scale = config.lora_alpha / config.lora_rank
        self.lora_a = Linear(base.inputs, config.lora_rank, std=(3 * base.inputs) ** -0.5)
        self.lora_b = Linear(config.lora_rank, base.outputs, std=0.0)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.scale * self.lora_b(self.lora_a(x))


def adapt(model: nn.Module, config: ModelConfig, *, whole: bool) -> None:
    """Freezes `model` and gives the matrices of its blocks that `config.lora_targets` names
    adapters, which are trained.

    An adapter is divided over ranks as its matrix is: of one that is split by output B is, of one
    that is split by input A is, so that a rank's part of either adds to its part of the output.

    Raises UserError where a `whole` model has no matrix of a name.
    """
    for param in model.parameters():
        param.requires_grad_(False)
    known: set[str] = set()
    for owner in _owners(model):
        for name, module in [*owner.named_modules()]:
            leaf = name.rpartition(".")[2]
            if isinstance(module, Linear):
                known.add(leaf)
            if isinstance(module, Linear) and leaf in config.lora_targets:
                _adapt_one(owner, name, module, config)
    unknown = [name for name in config.lora_targets if name not in known]
    if whole and unknown:
        raise UserError(
            f"model.lora_targets: no matrix is called {unknown[0]!r} (known: "
            f"{', '.join(sorted(known))})"
        )


def _owners(model: nn.Module) -> Iterator[Mixer | ChannelMixer]:
    """Mixers and channel mixers that are not parts of others: they say how parameters divide."""
    for child in model.children():
        if isinstance(child, Mixer | ChannelMixer):
            yield child
        else:
            yield from _owners(child)


def _adapt_one(owner: Mixer | ChannelMixer, name: str, base: Linear, config: ModelConfig) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(owner.get_submodule(parent), leaf, AdaptedLinear(base, config))
    word = next(word for at, word in owner.sharding.items() if f"{name}.".startswith(f"{at}."))
    owner.sharding = {
        **owner.sharding,
        f"{name}.lora_a": "row" if word == "row" else "replicate",
        f"{name}.lora_b": "replicate" if word == "row" else word,
    }


def merged(
    config: ModelConfig, tensors: Mapping[str, Tensor]
) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The model without adapters that computes the same, from the whole `tensors` of one with."""
    found = {name: x for name, x in tensors.items() if not name.endswith(PARTS)}
    for name, a in tensors.items():
        if name.endswith(PARTS[0]):
            base = name.removesuffix(PARTS[0])
            change = tensors[base + PARTS[1]].float() @ a.float()
            weight = found[f"{base}weight"]
            scaled = change * (config.lora_alpha / config.lora_rank)
            found[f"{base}weight"] = (weight.float() + scaled).to(weight.dtype)
    return dataclasses.replace(config, lora_rank=0), found
