"""Titans' memory alone: a layer whose state is a small network that learns as it reads."""

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
    max_learning_rate: float = 0.1
    """Upper end of a token's learning rate."""
    max_update: float = 10.0
    """Limit of the norm of a token's gradient of a matrix."""
    max_weight: float = 100.0
    """Limit of the norm of a matrix and of its momentum."""
    conv_width: int = 4
    """Taps of the short convolution on queries, keys and values."""


@MIXERS.register("titans_memory")
class TitansMemory(Mixer):
    """The long-term memory of Titans (arXiv 2501.00663) as a layer: `kernels.neural_memory` between
    projections, with q and k of unit norm, and per token and head

        θ = max_learning_rate σ(W_θ x + b_θ)    η = σ(W_η x + b_η)    1 - α = σ(W_α x + b_α)

    which begin about 0.05, 0.7 and 0.98. Output: normalised, times SiLU of a projection of x.

    State: `memory` `(B, H, 3, P)` float32 and `done` `(B,)` as in `MemoryState`, and the last
    inputs of the convolutions, `conv_q`, `conv_k`, `conv_v`, each `(B, conv_width - 1, dim)`.
    """

    Options: ClassVar[type] = TitansMemoryOptions
    sharding: ClassVar = {
        **{f"{name}_proj": "column" for name in ("q", "k", "v", "gate")},
        **{f"{name}_conv": "head" for name in ("q", "k", "v")},
        **{f"{name}_proj": "column" for name in ("rate", "momentum", "decay")},
        **{f"{name}_bias": "head" for name in ("rate", "momentum", "decay")},
        "memory": "head",
        "norm": "replicate",
        "o_proj": "row",
    }
    float32_parameters: ClassVar = ("rate_bias", "momentum_bias", "decay_bias")
    counters: ClassVar = {"titans_memory/limited": "limited"}

    def __init__(self, config: ModelConfig, options: Any, layer: int) -> None:
        super().__init__(config, options, layer)
        self.num_heads, self.head_dim = _sizes(config, options)
        self.scan, self.conv = neural_memory, short_conv
        inner, std = self.num_heads * self.head_dim, config.init_std
        for name in ("q", "k", "v"):
            setattr(self, f"{name}_proj", Linear(config.dim, inner, std=std))
            setattr(self, f"{name}_conv", ShortConv(inner, options.conv_width))
        for name, start in (("rate", 0.0), ("momentum", 0.85), ("decay", 4.0)):
            setattr(self, f"{name}_proj", Linear(config.dim, self.num_heads, std=std))
            setattr(self, f"{name}_bias", parameter((self.num_heads,), constant(start)))
        # How often a limit kept the memory in bounds.
        self.register_buffer("limited", torch.zeros((), dtype=torch.int64), persistent=False)
        self.memory = Memory(self.num_heads, self.head_dim, options)
        self.gate_proj = Linear(config.dim, inner, std=std)
        self.norm = GatedRMSNorm(self.head_dim, config.norm_eps)
        self.o_proj = Linear(inner, config.dim, std=config.residual_std)

    @classmethod
    def problems(cls, config: ModelConfig, options: Any) -> list[str]:
        found = []
        if not 1 <= options.depth <= 4:
            found.append(f"depth: must be 1 to 4, got {options.depth}")
        if options.chunk_size < 1:
            found.append(f"chunk_size: must be at least 1, got {options.chunk_size}")
        if _sizes(config, options)[1] * options.expansion < 1:
            found.append(f"expansion: leaves the memory no channels, got {options.expansion}")
        return found

    @classmethod
    def heads(cls, config: ModelConfig, options: Any) -> dict[str, int]:
        return {"num_heads": _sizes(config, options)[0]}

    def forward(
        self, x: Tensor, ctx: SequenceContext, state: State | None = None
    ) -> tuple[Tensor, State]:
        after: State = {}
        q, k, v = (self._convolve(name, x, ctx, state, after) for name in ("q", "k", "v"))
        rate, momentum, decay = (self._gate(name, x) for name in ("rate", "momentum", "decay"))
        found = self.scan(
            l2_norm(q),
            l2_norm(k),
            v,
            self.options.max_learning_rate * rate.sigmoid(),
            F.logsigmoid(momentum),
            F.logsigmoid(decay),
            self.memory(),
            max_update=self.options.max_update,
            max_weight=self.options.max_weight,
            initial_state=None if state is None else MemoryState(state["memory"], state["done"]),
            segment_ids=ctx.segment_ids,
            chunk_size=self.options.chunk_size,
        )
        after["memory"], after["done"] = found.state
        if self.training:
            self.limited += found.limited.sum()
        o = self.norm(found.o, split_heads(self.gate_proj(x), self.head_dim))
        return self.o_proj(o.flatten(2)), after

    def _gate(self, name: str, x: Tensor) -> Tensor:
        scores = getattr(self, f"{name}_proj")(x)
        return at_least_float32(scores) + getattr(self, f"{name}_bias")

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
        first, *above = self.memory.matrices()
        # Of each matrix: what it makes of k and of q, and the write; errors go back through all
        # but the first.
        memory = 6.0 * (first + sum(above)) + 2.0 * sum(above)
        conv = 6 * self.options.conv_width * self.head_dim
        return self.num_heads * (memory + conv)


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


def _sizes(config: ModelConfig, options: TitansMemoryOptions) -> tuple[int, int]:
    head_dim = options.head_dim or min(64, config.dim)
    return options.num_heads or max(1, config.dim // head_dim), head_dim
