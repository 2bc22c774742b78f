"""Titans' memory: a layer whose state is a small network that learns as it reads."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rondo.kernels import l2_norm, neural_memory, short_conv
from rondo.kernels.neural_memory import MemoryState
from rondo.models.config import ModelConfig
from rondo.models.init import constant, normal, parameter
from rondo.models.layers import GatedRMSNorm, Linear, ShortConv, at_least_float32
from rondo.models.mixer import Mixer, SequenceContext, State, get, split_heads
from rondo.models.registry import MIXERS


@dataclass
class TitansMemoryOptions:
    """Hyper-parameters of `titans_memory`."""

    num_heads: int | None = None
    """Heads, each with a memory of its own; None: dim / head_dim."""
    head_dim: int | None = None
    """Width of queries, keys and values in a head; None: 64, or dim where that is less."""
    depth: int = 2
    """Layers of the memory."""
    expansion: float = 2.0
    """Width between them over head_dim."""
    chunk_size: int = 16
    """Tokens whose gradients are taken at the same weights. Part of the model: another size is
    another model."""
    max_learning_rate: float = 1.0
    """Upper end of the step that the tokens of a chunk take together, were their keys the same, as
    a share of the way to the minimum."""
    max_update: float = 10.0
    """Limit of the norm of a token's gradient of a matrix."""
    max_weight: float = 100.0
    """Limit of the norm of a matrix and of its momentum."""
    conv_width: int = 4
    """Taps of the short convolution on queries, keys and values."""


class LearningHeads(Mixer):
    """What all layers with a neural memory have: the weights that a document's memory begins with,
    and per token and head

        η = σ(W_η x + b_η)    1 - α = σ(W_α x + b_α)    θ = ρ σ(W_θ x + b_θ) (1 - η) / (2 C)

    with ρ `max_learning_rate` and C `chunk_size`; they begin about 0.7, 0.98 and 0.15 ρ / (2 C).
    Gradients of a chunk are taken at the same weights, the loss bends by 2 along a unit key, and
    momentum makes of a step 1 / (1 - η): were all keys of a chunk the same, a memory of one layer
    would overshoot from ρ = 1 on and run away from 2 on.
    """

    Options: ClassVar[type] = TitansMemoryOptions
    sharding: ClassVar[dict[str, str]] = {
        **{f"{name}_proj": "column" for name in ("rate", "momentum", "decay")},
        **{f"{name}_bias": "head" for name in ("rate", "momentum", "decay")},
        "memory": "head",
    }
    float32_parameters: ClassVar[tuple[str, ...]] = ("rate_bias", "momentum_bias", "decay_bias")
    counters: ClassVar[dict[str, str]] = {"titans_memory/limited": "limited"}

    def __init__(self, config: ModelConfig, options: Any, layer: int) -> None:
        super().__init__(config, options, layer)
        self.num_heads, self.head_dim = memory_sizes(config, options)
        for name, start in (("rate", 0.0), ("momentum", 0.85), ("decay", 4.0)):
            setattr(self, f"{name}_proj", Linear(config.dim, self.num_heads, std=config.init_std))
            setattr(self, f"{name}_bias", parameter((self.num_heads,), constant(start)))
        # How often a limit kept the memory in bounds.
        self.register_buffer("limited", torch.zeros((), dtype=torch.int64), persistent=False)
        self.memory = Memory(self.num_heads, self.head_dim, options)

    @classmethod
    def problems(cls, config: ModelConfig, options: Any) -> list[str]:
        found = []
        if not 1 <= options.depth <= 4:
            found.append(f"depth: must be 1 to 4, got {options.depth}")
        if options.chunk_size < 1:
            found.append(f"chunk_size: must be at least 1, got {options.chunk_size}")
        if options.depth > 1 and memory_sizes(config, options)[1] * options.expansion < 1:
            found.append(f"expansion: leaves the memory no channels, got {options.expansion}")
        return found

    @classmethod
    def heads(cls, config: ModelConfig, options: Any) -> dict[str, int]:
        return {"num_heads": memory_sizes(config, options)[0]}

    def gates(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """θ, ln η and ln(1 - α), each `(B, T, heads)`, at least float32."""
        rate, momentum, decay = (self._scores(name, x) for name in ("rate", "momentum", "decay"))
        step = self.options.max_learning_rate / (2 * self.options.chunk_size)
        rate = step * rate.sigmoid() * (-momentum).sigmoid()
        return rate, F.logsigmoid(momentum), F.logsigmoid(decay)

    def _scores(self, name: str, x: Tensor) -> Tensor:
        scores = getattr(self, f"{name}_proj")(x)
        return at_least_float32(scores) + getattr(self, f"{name}_bias")

    def limits(self) -> dict[str, Any]:
        """What the operator takes of the options."""
        names = ("max_update", "max_weight", "chunk_size")
        return {name: getattr(self.options, name) for name in names}

    def count(self, limited: Tensor) -> None:
        """Counts how often a limit acted, in training."""
        if self.training:
            self.limited += limited.sum()

    def learning_flops(self) -> float:
        """Forward FLOPs a token and head: of each matrix what it makes of k and of q, and the
        write; errors go back through all but the first."""
        first, *above = self.memory.matrices()
        return 6.0 * (first + sum(above)) + 2.0 * sum(above)


class MemoryHeads(LearningHeads):
    """The memory without what comes after its reads: what `TitansMemory` is, and part of other
    mixers. State as there."""

    sharding: ClassVar[dict[str, str]] = {
        **LearningHeads.sharding,
        **{f"{name}_proj": "column" for name in ("q", "k", "v")},
        **{f"{name}_conv": "head" for name in ("q", "k", "v")},
    }

    def __init__(self, config: ModelConfig, options: Any, layer: int) -> None:
        super().__init__(config, options, layer)
        self.scan, self.conv = neural_memory, short_conv
        inner = self.num_heads * self.head_dim
        for name in ("q", "k", "v"):
            setattr(self, f"{name}_proj", Linear(config.dim, inner, std=config.init_std))
            setattr(self, f"{name}_conv", ShortConv(inner, options.conv_width))

    def forward(
        self, x: Tensor, ctx: SequenceContext, state: State | None = None
    ) -> tuple[Tensor, State]:
        """What the memory reads `(B, T, num_heads, head_dim)`, and the state after it."""
        after: State = {}
        q, k, v = (self._convolve(name, x, ctx, state, after) for name in ("q", "k", "v"))
        found = self.scan(
            l2_norm(q),
            l2_norm(k),
            v,
            *self.gates(x),
            self.memory(),
            initial_state=None if state is None else MemoryState(state["memory"], state["done"]),
            segment_ids=ctx.segment_ids,
            **self.limits(),
        )
        after["memory"], after["done"] = found.state
        self.count(found.limited)
        return found.o, after

    def _convolve(
        self, name: str, x: Tensor, ctx: SequenceContext, state: State | None, after: State
    ) -> Tensor:
        y, after[f"conv_{name}"] = getattr(self, f"{name}_conv")(
            getattr(self, f"{name}_proj")(x),
            self.conv,
            initial_state=get(state, f"conv_{name}"),
            segment_ids=ctx.segment_ids,
        )
        return split_heads(y, self.head_dim)

    def state_shapes(
        self, batch: int, length: int
    ) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        conv = (batch, self.options.conv_width - 1, self.num_heads * self.head_dim)
        numbers = sum(self.memory.matrices())
        return {
            "memory": ((batch, self.num_heads, 3, numbers), torch.float32),
            "done": ((batch,), torch.int64),
            **{f"conv_{name}": (conv, torch.bfloat16) for name in ("q", "k", "v")},
        }

    def operator_flops(self, length: int) -> float:
        conv = 6 * self.options.conv_width * self.head_dim
        return self.num_heads * (self.learning_flops() + conv)


@MIXERS.register("titans_memory")
class TitansMemory(MemoryHeads):
    """The long-term memory of Titans (arXiv 2501.00663) as a layer: `kernels.neural_memory` between
    projections, with q and k of unit norm and gates as in `LearningHeads`. Output: normalised,
    times SiLU of a projection of x.

    State: `memory` `(B, H, 3, P)` float32 and `done` `(B,)` as in `MemoryState`, and the last
    inputs of the convolutions, `conv_q`, `conv_k`, `conv_v`, each `(B, conv_width - 1, dim)`.
    """

    sharding: ClassVar[dict[str, str]] = {
        **MemoryHeads.sharding,
        "gate_proj": "column",
        "norm": "replicate",
        "o_proj": "row",
    }

    def __init__(self, config: ModelConfig, options: Any, layer: int) -> None:
        super().__init__(config, options, layer)
        inner = self.num_heads * self.head_dim
        self.gate_proj = Linear(config.dim, inner, std=config.init_std)
        self.norm = GatedRMSNorm(self.head_dim, config.norm_eps)
        self.o_proj = Linear(inner, config.dim, std=config.residual_std)

    def forward(
        self, x: Tensor, ctx: SequenceContext, state: State | None = None
    ) -> tuple[Tensor, State]:
        o, after = super().forward(x, ctx, state)
        o = self.norm(o, split_heads(self.gate_proj(x), self.head_dim))
        return self.o_proj(o.flatten(2)), after


class Memory(nn.Module):
    """The weights `(heads, out, in)` that every document's memory begins with."""

    def __init__(self, heads: int, dim: int, options: TitansMemoryOptions) -> None:
        super().__init__()
        self.shapes = layer_shapes(dim, options)
        for i, (out, into) in enumerate(self.shapes):
            self.register_parameter(f"layer_{i}", parameter((heads, out, into), normal(into**-0.5)))

    def matrices(self) -> list[int]:
        """Numbers in each matrix of a head."""
        return [math.prod(shape) for shape in self.shapes]

    def forward(self) -> tuple[Tensor, ...]:
        return tuple(getattr(self, f"layer_{i}") for i in range(len(self.shapes)))


def layer_shapes(dim: int, options: TitansMemoryOptions) -> list[tuple[int, int]]:
    """`(out, in)` of each layer of a memory."""
    widths = [dim, *[int(dim * options.expansion)] * (options.depth - 1), dim]
    return [(out, into) for into, out in itertools.pairwise(widths)]


def memory_sizes(config: ModelConfig, options: TitansMemoryOptions) -> tuple[int, int]:
    """Heads and their width."""
    head_dim = options.head_dim or min(64, config.dim)
    return options.num_heads or max(1, config.dim // head_dim), head_dim
