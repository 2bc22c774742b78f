"""Mamba2ForCausalLM: Mamba-2 in every layer, without channel mixers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rondo.models.config import ModelConfig, make_options
from rondo.models.hf.bonds import Bond, same
from rondo.models.hf.common import matrices, refuse, sizes

_NO_LIMITS = [0.0, float("inf")]


class Mamba2Architecture:
    """`Mamba2ForCausalLM` (arXiv 2405.21060)."""

    name, model_type = "Mamba2ForCausalLM", "mamba2"

    def unlike(self, config: ModelConfig) -> str | None:
        """Why a model of ours is none of these; None if it is one."""
        if config.zero_centered_norms:
            return f"{self.name} needs zero_centered_norms False, not True"
        specs = config.layers()
        for spec in specs:
            if (spec.mixer, spec.ffn) != ("mamba2", "none"):
                return f"{self.name} has mamba2+none in every layer, not {spec.mixer}+{spec.ffn}"
            if spec.options != specs[0].options:
                return f"{self.name} has the same options in every layer"
        return None

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """What their config.json says of it."""
        options = _options(config)
        values = sizes(config)
        del values["rms_norm_eps"], values["intermediate_size"]
        return values | {
            "layer_norm_epsilon": config.norm_eps,
            "expand": options.expand,
            "head_dim": options.head_dim,
            "num_heads": options.expand * config.dim // options.head_dim,
            "state_size": options.state_dim,
            "n_groups": options.num_groups,
            "conv_kernel": options.conv_width,
            "use_bias": False,
            "use_conv_bias": True,
        }

    def read(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The keys of our configuration, from their config.json. Raises UserError."""
        refuse(values, use_bias=False, use_conv_bias=True, hidden_act="silu")
        limits = [float(_number(limit)) for limit in values.get("time_step_limit", _NO_LIMITS)]
        refuse({"time_step_limit": limits}, time_step_limit=_NO_LIMITS)
        return {
            "vocab_size": int(values["vocab_size"]),
            "dim": int(values["hidden_size"]),
            "num_layers": int(values["num_hidden_layers"]),
            "norm_eps": float(values["layer_norm_epsilon"]),
            "tie_embeddings": bool(values.get("tie_word_embeddings", False)),
            "pattern": ["mamba2+none"],
            "mixers": {
                "mamba2": {
                    "expand": int(values["expand"]),
                    "head_dim": int(values["head_dim"]),
                    "state_dim": int(values["state_size"]),
                    "num_groups": int(values["n_groups"]),
                    "conv_width": int(values["conv_kernel"]),
                }
            },
        }

    def bonds(self, config: ModelConfig) -> list[Bond]:
        """All tensors."""
        found = matrices(config, "backbone.embeddings")
        found.append(same("backbone.norm_f.weight", "norm.weight"))
        for i in range(config.num_layers):
            ours, theirs = f"blocks.{i}", f"backbone.layers.{i}"
            found.append(same(f"{theirs}.norm.weight", f"{ours}.mixer_norm.weight"))
            found += _layer(config, f"{ours}.mixer", f"{theirs}.mixer")
        return found


def _number(value: Any) -> Any:
    """transformers 5 writes an infinity as {"__float__": "Infinity"}."""
    return value["__float__"] if isinstance(value, dict) else value


def _options(config: ModelConfig) -> Any:
    spec = config.layers()[0]
    return make_options(spec.mixer, spec.options, spec.name)


def _layer(config: ModelConfig, ours: str, theirs: str) -> list[Bond]:
    """Theirs has one projection to z, x, B, C and the steps, one convolution over x, B and C. B and
    C of a group are side by side here; there, B of all groups comes first."""
    options = _options(config)
    inner = options.expand * config.dim
    bc, heads = 2 * options.num_groups * options.state_dim, inner // options.head_dim
    groups, state = options.num_groups, options.state_dim

    def apart(x: Tensor) -> Tensor:
        return x.unflatten(0, (groups, 2, state)).transpose(0, 1).flatten(0, 2)

    def together(x: Tensor) -> Tensor:
        return x.unflatten(0, (2, groups, state)).transpose(0, 1).flatten(0, 2)

    def pack(parts: Sequence[Tensor]) -> Tensor:
        z, x, bc_rows, dt = parts
        return torch.cat([z, x, apart(bc_rows), dt])

    def unpack(whole: Tensor) -> list[Tensor]:
        z, x, bc_rows, dt = whole.split([inner, inner, bc, heads])
        return [z, x, together(bc_rows), dt]

    def pack_taps(parts: Sequence[Tensor]) -> Tensor:
        return torch.cat([parts[0], apart(parts[1])])

    def unpack_taps(whole: Tensor) -> list[Tensor]:
        x, rows = whole.split([inner, bc])
        return [x, together(rows)]

    projections = tuple(f"{ours}.{name}_proj.weight" for name in ("z", "x", "bc", "dt"))
    taps, biases = (
        (f"{ours}.x_conv.{kind}", f"{ours}.bc_conv.{kind}") for kind in ("weight", "bias")
    )
    plain = {"dt_bias": "dt_bias", "A_log": "A_log", "D": "D"}
    plain |= {"norm.weight": "norm.weight", "out_proj.weight": "o_proj.weight"}
    return [
        Bond(f"{theirs}.in_proj.weight", projections, pack, unpack),
        Bond(
            f"{theirs}.conv1d.weight",
            taps,
            lambda parts: pack_taps(parts).unsqueeze(1),
            lambda whole: unpack_taps(whole.squeeze(1)),
        ),
        Bond(f"{theirs}.conv1d.bias", biases, pack_taps, unpack_taps),
        *(same(f"{theirs}.{b}", f"{ours}.{a}") for b, a in plain.items()),
    ]
