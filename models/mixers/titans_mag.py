"""Titans' memory as a gate: a sliding window of attention, gated by the long-term memory."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from rondo.models.config import ModelConfig
from rondo.models.layers import Linear, RMSNorm
from rondo.models.mixer import Mixer, SequenceContext, State, join_states, part_of
from rondo.models.mixers.attention import AttentionHeads, AttentionOptions
from rondo.models.mixers.titans_memory import MemoryHeads, TitansMemoryOptions, memory_sizes
from rondo.models.registry import MIXERS


@dataclass
class TitansMagOptions(TitansMemoryOptions):
    """Hyper-parameters of `titans_mag`: those of its memory, and of attention with as many heads
    of the same width."""

    window: int | None = 512
    """Keys a query sees, itself included; None: all before it."""
    persistent_tokens: int = field(default=16, metadata={"zero": True})
    """Learned keys and values that every query sees."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""


@MIXERS.register("titans_mag")
class TitansMag(Mixer):
    """Memory as a gate (MAG, arXiv 2501.00663, section 4.2): per head

        o = norm_a(attention(x)) σ(norm_m(memory(x)))

    with attention over a sliding window and persistent tokens, a memory as in `titans_memory`, and
    norms with weights of their own; the paper leaves the nonlinearity of the gate open.

    State: `attention.*` and `memory.*`, those of its parts.
    """

    Options: ClassVar[type] = TitansMagOptions
    sharding: ClassVar[dict[str, str]] = {
        **{f"attention.{name}": word for name, word in AttentionHeads.sharding.items()},
        **{f"memory.{name}": word for name, word in MemoryHeads.sharding.items()},
        "attention_norm": "replicate",
        "memory_norm": "replicate",
        "o_proj": "row",
    }
    counters: ClassVar[dict[str, str]] = {
        metric: f"memory.{buffer}" for metric, buffer in MemoryHeads.counters.items()
    }

    def __init__(self, config: ModelConfig, options: Any, layer: int) -> None:
        super().__init__(config, options, layer)
        self.memory = MemoryHeads(config, options, layer)
        self.attention = AttentionHeads(
            config, attention_options(config, options, options.window), layer
        )
        head_dim = self.memory.head_dim
        self.attention_norm = RMSNorm(head_dim, config)
        self.memory_norm = RMSNorm(head_dim, config)
        inner = self.memory.num_heads * head_dim
        self.o_proj = Linear(inner, config.dim, std=config.residual_std)

    @classmethod
    def problems(cls, config: ModelConfig, options: Any) -> list[str]:
        attention = AttentionHeads.problems(
            config, attention_options(config, options, options.window)
        )
        return MemoryHeads.problems(config, options) + attention

    @classmethod
    def heads(cls, config: ModelConfig, options: Any) -> dict[str, int]:
        return MemoryHeads.heads(config, options)

    def forward(
        self, x: Tensor, ctx: SequenceContext, state: State | None = None
    ) -> tuple[Tensor, State]:
        found, attended = self.attention(x, ctx, part_of(state, "attention"))
        m, remembered = self.memory(x, ctx, part_of(state, "memory"))
        o = self.attention_norm(found.o) * self.memory_norm(m).sigmoid()
        after = join_states(attention=attended, memory=remembered)
        return self.o_proj(o.flatten(2)), after

    def state_shapes(
        self, batch: int, length: int
    ) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return join_states(
            attention=self.attention.state_shapes(batch, length),
            memory=self.memory.state_shapes(batch, length),
        )

    def operator_flops(self, length: int) -> float:
        return self.attention.operator_flops(length) + self.memory.operator_flops(length)


def attention_options(config: ModelConfig, options: Any, window: int | None) -> AttentionOptions:
    """Attention with heads as those of the memory."""
    heads, head_dim = memory_sizes(config, options)
    return AttentionOptions(
        num_heads=heads,
        head_dim=head_dim,
        window=window,
        persistent_tokens=options.persistent_tokens,
        rope_theta=options.rope_theta,
    )
