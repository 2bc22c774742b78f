"""Softmax attention: grouped heads, RoPE or none, QK norm, sliding window, persistent tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from rondo.kernels import attend_prefix, attention
from rondo.kernels.rope import RopeScaling, rope_table, rotate
from rondo.models import kv_cache
from rondo.models.config import ModelConfig
from rondo.models.init import constant, normal, parameter
from rondo.models.layers import Linear, RMSNorm
from rondo.models.mixer import Mixer, SequenceContext, State, split_heads
from rondo.models.registry import MIXERS


@dataclass
class AttentionOptions:
    """Hyper-parameters of `attention`."""

    num_heads: int | None = None
    """Query heads; None: dim / 64, at least 1."""
    num_kv_heads: int | None = None
    """Key/value heads; None: as many as query heads."""
    head_dim: int | None = None
    """Width of a head; None: dim / num_heads."""
    window: int | None = None
    """Keys a query sees, itself included; None: all before it."""
    rope: bool = True
    """Rotary position embedding (positions restart with each document)."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""
    rope_fraction: float = 1.0
    """Share of a head's channels, the first ones, that rotate."""
    rope_scaling: RopeScaling | None = None
    """Slower rotations for longer texts, as Llama 3.1 has them: {factor: 8, low_freq_factor: 1,
    high_freq_factor: 4, original_max_position_embeddings: 8192} (`kernels/rope.py`: equations)."""
    qk_norm: bool = True
    """RMSNorm of queries and keys, per head, before RoPE."""
    qkv_bias: bool = False
    """Add a vector, 0 at the start, to queries, keys and values (arXiv 2309.16609)."""
    persistent_tokens: int = field(default=0, metadata={"zero": True})
    """Learned keys and values that every query sees, whatever its document (persistent memory,
    arXiv 1907.01470, 2501.00663). Queries meet them without RoPE."""
    output_gate: bool = False
    """Multiply what heads give by the sigmoid of a projection of the input (arXiv 2505.06708)."""


class HeadsRead(NamedTuple):
    """What heads of attention give."""

    o: Tensor
    """`(B, T, num_heads, head_dim)`."""
    lse: Tensor | None
    """`(B, T, num_heads)`: log-sum-exp of the scores, if asked for."""
    q: Tensor
    """`(B, T, num_heads, head_dim)`: the queries before RoPE."""


class AttentionHeads(Mixer):
    """Attention without its output matrix: what `Attention` is, and part of other mixers."""

    Options = AttentionOptions
    sharding: ClassVar[dict[str, str]] = {
        "q_proj": "column",
        "k_proj": "column",
        "v_proj": "column",
        "q_norm": "replicate",
        "k_norm": "replicate",
        "persistent_k": "head",
        "persistent_v": "head",
    }

    def __init__(self, config: ModelConfig, options: AttentionOptions, layer: int) -> None:
        super().__init__(config, options, layer)
        self.num_heads, self.num_kv_heads, self.head_dim = _sizes(config, options)
        self.attend: Callable[..., Any] = attention
        inner, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        bias = constant(0.0) if options.qkv_bias else None
        self.q_proj = Linear(config.dim, inner, std=config.init_std, bias=bias)
        self.k_proj = Linear(config.dim, kv, std=config.init_std, bias=bias)
        self.v_proj = Linear(config.dim, kv, std=config.init_std, bias=bias)
        if options.qk_norm:
            self.q_norm = RMSNorm(self.head_dim, config)
            self.k_norm = RMSNorm(self.head_dim, config)
        if options.persistent_tokens:
            shape = (self.num_kv_heads, options.persistent_tokens, self.head_dim)
            self.persistent_k = parameter(shape, normal(self.head_dim**-0.5))
            self.persistent_v = parameter(shape, normal(self.head_dim**-0.5))

    @classmethod
    def problems(cls, config: ModelConfig, options: AttentionOptions) -> list[str]:
        heads, kv, head_dim = _sizes(config, options)
        found = []
        if options.head_dim is None and config.dim % heads:
            found.append(f"num_heads: model.dim {config.dim} is not divisible by {heads} heads")
        if heads % kv:
            found.append(f"num_kv_heads: {heads} heads are not divisible by {kv} key/value heads")
        turning = int(head_dim * options.rope_fraction)
        if options.rope and (turning % 2 or not 2 <= turning <= head_dim):
            found.append(
                f"head_dim: RoPE needs an even number of channels, 2 or more, got {turning} "
                f"({options.rope_fraction:g} of {head_dim})"
            )
        if options.rope_scaling and (problem := options.rope_scaling.problem()):
            found.append(f"rope_scaling.{problem}")
        return found

    @classmethod
    def heads(cls, config: ModelConfig, options: AttentionOptions) -> dict[str, int]:
        heads, kv, _ = _sizes(config, options)
        return {"num_heads": heads, "num_kv_heads": kv}

    def forward(  # a part of mixers, which know what else it gives
        self,
        x: Tensor,
        ctx: SequenceContext,
        state: State | None = None,
        *,
        return_lse: bool = False,
    ) -> tuple[Any, State]:
        """A `HeadsRead`, and the state after it."""
        return self.read(*self.project(x), ctx, state, return_lse=return_lse)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries `(B, T, num_heads, head_dim)`, keys and values `(B, T, num_kv_heads, head_dim)`
        of `x` `(B, T, dim)`, normalised and without RoPE."""
        q, k, v = (
            split_heads(self.q_proj(x), self.head_dim),
            split_heads(self.k_proj(x), self.head_dim),
            split_heads(self.v_proj(x), self.head_dim),
        )
        if self.options.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v

    def read(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        ctx: SequenceContext,
        state: State | None = None,
        *,
        return_lse: bool = False,
    ) -> tuple[HeadsRead, State]:
        """What the queries of `project` find, and the state after it."""
        unrotated = q
        if self.options.rope:
            table = rope_table(
                ctx.positions,
                int(self.head_dim * self.options.rope_fraction),
                theta=self.options.rope_theta,
                scaling=self.options.rope_scaling,
                dtype=torch.promote_types(q.dtype, torch.float32),
            )
            q, k = rotate(q, *table), rotate(k, *table)
        cache, segments, key_segments = kv_cache.extend(state, k, v, ctx.segment_ids)
        found = self.attend(
            q,
            cache["k"],
            cache["v"],
            window=self.options.window,
            segment_ids=segments,
            key_segment_ids=key_segments,
            return_lse=return_lse or self.options.persistent_tokens > 0,
        )
        o, lse = (found, None) if isinstance(found, Tensor) else found
        if lse is not None and self.options.persistent_tokens > 0:
            o, lse = attend_prefix(unrotated, *self._persistent(o.dtype), o, lse)
        window = self.options.window
        return HeadsRead(o, lse, unrotated), cache if window is None else kv_cache.trim(
            cache, window
        )

    def _persistent(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Persistent keys and values `(persistent_tokens, num_kv_heads, head_dim)`."""
        k, v = (x.transpose(0, 1).to(dtype) for x in (self.persistent_k, self.persistent_v))
        return self.k_norm(k) if self.options.qk_norm else k, v

    def state_shapes(
        self, batch: int, length: int
    ) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        kept = length if self.options.window is None else min(length, self.options.window - 1)
        shape = (batch, kept, self.num_kv_heads, self.head_dim)
        return {"k": (shape, torch.bfloat16), "v": (shape, torch.bfloat16)}

    def operator_flops(self, length: int) -> float:
        window = min(self.options.window or length, length)
        seen = window - window * (window - 1) / (2 * length)  # mean number of keys a query sees
        return 4.0 * (seen + self.options.persistent_tokens) * self.num_heads * self.head_dim


@MIXERS.register("attention")
class Attention(AttentionHeads):
    """Causal attention (arXiv 1706.03762; GQA arXiv 2305.13245; RoPE arXiv 2104.09864).

    State: `k`, `v` `(B, S, num_kv_heads, head_dim)`, and `live` `(B, S)` bool: which cached
    positions belong to the document that goes on.
    """

    sharding: ClassVar[dict[str, str]] = {
        **AttentionHeads.sharding,
        "gate_proj": "column",
        "o_proj": "row",
    }

    def __init__(self, config: ModelConfig, options: AttentionOptions, layer: int) -> None:
        super().__init__(config, options, layer)
        inner = self.num_heads * self.head_dim
        if options.output_gate:
            self.gate_proj = Linear(config.dim, inner, std=config.init_std)
        self.o_proj = Linear(inner, config.dim, std=config.residual_std)

    def forward(
        self, x: Tensor, ctx: SequenceContext, state: State | None = None
    ) -> tuple[Tensor, State]:
        found, state = super().forward(x, ctx, state)
        return self.write(x, found.o), state

    def write(self, x: Tensor, o: Tensor) -> Tensor:
        """What heads found, `(B, T, num_heads, head_dim)`, as the output `(B, T, dim)`."""
        o = o.flatten(2)
        if self.options.output_gate:
            o = o * self.gate_proj(x).sigmoid()
        return self.o_proj(o)


def _sizes(config: ModelConfig, options: AttentionOptions) -> tuple[int, int, int]:
    heads = options.num_heads or max(1, config.dim // 64)
    return heads, options.num_kv_heads or heads, options.head_dim or config.dim // heads
