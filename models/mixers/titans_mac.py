"""Titans' memory as context: segments of attention that also see what the memory recalls."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from rondo.kernels import l2_norm, memory_context, short_conv
from rondo.kernels.memory_context import ContextState
from rondo.models.config import ModelConfig
from rondo.models.init import normal, parameter
from rondo.models.layers import Linear, RMSNorm, ShortConv
from rondo.models.mixer import SequenceContext, State, get, join_states, part_of, split_heads
from rondo.models.mixers.attention import AttentionHeads
from rondo.models.mixers.titans_mag import attention_options
from rondo.models.mixers.titans_memory import LearningHeads, TitansMemoryOptions
from rondo.models.registry import MIXERS


@dataclass
class TitansMacOptions(TitansMemoryOptions):
    """Hyper-parameters of `titans_mac`: those of its memory, and of attention with as many heads
    of the same width."""

    segment_size: int = 512
    """Tokens of a segment, a multiple of chunk_size. Part of the model."""
    persistent_tokens: int = field(default=16, metadata={"zero": True})
    """Learned keys and values that every query sees."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""


@MIXERS.register("titans_mac")
class TitansMac(LearningHeads):
    """Memory as context (MAC, arXiv 2501.00663, section 4.1) by `kernels.memory_context`: tokens
    attend to their segment, to persistent tokens, and to what the memory recalled for the tokens of
    the segment up to them, with its weights from before the segment; the memory then learns from
    what attention found (y) and is read with it (m). Per head

        o = norm_a(y) σ(norm_m(m))

    Queries that recall are convolved; gates are functions of the layer's input. As projections of
    recalled values and of y are of single heads, heads can be divided among ranks.

    State: `context` and `count` as in `ContextState`, `attention.*` with at most
    `segment_size - 1` keys, and the last inputs of the convolution, `conv_r`.
    """

    Options: ClassVar[type] = TitansMacOptions
    sharding: ClassVar[dict[str, str]] = {
        **LearningHeads.sharding,
        **{f"attention.{name}": word for name, word in AttentionHeads.sharding.items()},
        "r_proj": "column",
        "r_conv": "head",
        **{f"recall_{name}": "head" for name in ("k", "v")},
        **{f"learn_{name}": "head" for name in ("q", "k", "v")},
        "attention_norm": "replicate",
        "memory_norm": "replicate",
        "o_proj": "row",
    }

    def __init__(self, config: ModelConfig, options: Any, layer: int) -> None:
        super().__init__(config, options, layer)
        self.scan, self.conv = memory_context, short_conv
        self.attention = AttentionHeads(
            config, attention_options(config, options, options.segment_size), layer
        )
        heads, dim = self.num_heads, self.head_dim
        self.r_proj = Linear(config.dim, heads * dim, std=config.init_std)
        self.r_conv = ShortConv(heads * dim, options.conv_width)
        for name in ("recall_k", "recall_v", "learn_q", "learn_k", "learn_v"):
            setattr(self, name, parameter((heads, dim, dim), normal(dim**-0.5)))
        self.attention_norm = RMSNorm(dim, config)
        self.memory_norm = RMSNorm(dim, config)
        self.o_proj = Linear(heads * dim, config.dim, std=config.residual_std)

    @classmethod
    def problems(cls, config: ModelConfig, options: Any) -> list[str]:
        found = super().problems(config, options)
        found += AttentionHeads.problems(
            config, attention_options(config, options, options.segment_size)
        )
        if options.chunk_size > 0 and options.segment_size % options.chunk_size:
            found.append(
                f"segment_size: {options.segment_size} is not a multiple of chunk_size "
                f"{options.chunk_size}"
            )
        return found

    def forward(
        self, x: Tensor, ctx: SequenceContext, state: State | None = None
    ) -> tuple[Tensor, State]:
        attended, cache = self._attend(x, ctx, state)
        after: State = join_states(attention=cache)
        r, after["conv_r"] = self.r_conv(
            self.r_proj(x),
            self.conv,
            initial_state=get(state, "conv_r"),
            segment_ids=ctx.segment_ids,
        )
        found = self.scan(
            attended.q,
            attended.o,
            attended.lse,
            l2_norm(split_heads(r, self.head_dim)),
            *self.gates(x),
            self._matrices("recall_k", "recall_v"),
            self._matrices("learn_q", "learn_k", "learn_v"),
            self.memory(),
            segment_size=self.options.segment_size,
            initial_state=None if state is None else ContextState(state["context"], state["count"]),
            segment_ids=ctx.segment_ids,
            **self.limits(),
        )
        after["context"], after["count"] = found.state
        self.count(found.limited)
        y, m = found.o.chunk(2, -1)
        o = self.attention_norm(y) * self.memory_norm(m).sigmoid()
        return self.o_proj(o.flatten(2)), after

    def _matrices(self, *names: str) -> tuple[Any, ...]:
        return tuple(getattr(self, name) for name in names)

    def _attend(self, x: Tensor, ctx: SequenceContext, state: State | None) -> Any:
        """Attention within segments, of which those that touch have different ids: one bit more
        tells them apart, since the window reaches no further."""
        size = self.options.segment_size
        ids = ctx.positions // size % 2
        if ctx.segment_ids is not None:
            ids = ids + 2 * ctx.segment_ids
        cache = part_of(state, "attention")
        if cache is not None:  # of a segment that is complete, nothing is seen any more
            cache["live"] = cache["live"] & (ctx.positions[:, :1] % size > 0)
        inner = dataclasses.replace(ctx, segment_ids=ids)
        return self.attention(x, inner, cache, return_lse=True)

    def state_shapes(
        self, batch: int, length: int
    ) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        heads, dim, size = self.num_heads, self.head_dim, self.options.segment_size
        numbers = 4 * sum(self.memory.matrices()) + 2 * (size - 1) * dim
        cache = self.attention.state_shapes(batch, length)
        cache["live"] = (cache["k"][0][:2], torch.bool)
        return {
            **join_states(attention=cache),
            "context": ((batch, heads, numbers), torch.float32),
            "count": ((batch,), torch.int64),
            "conv_r": ((batch, self.options.conv_width - 1, heads * dim), torch.bfloat16),
        }

    def operator_flops(self, length: int) -> float:
        heads, dim = self.num_heads, self.head_dim
        size = min(self.options.segment_size, length)
        seen = (size + 1) / 2 + (size + 1) / 2 + self.options.persistent_tokens
        projections = 2.0 * 5 * dim * dim
        recalled = 2.0 * sum(self.memory.matrices())
        conv = 2 * self.options.conv_width * dim
        return heads * (4.0 * seen * dim + projections + recalled + self.learning_flops() + conv)
