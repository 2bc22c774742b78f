"""Liger: a pretrained attention layer read as gated linear attention, beside a window of itself."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from rondo.kernels import gated_linear_attention
from rondo.models.config import ModelConfig
from rondo.models.layers import at_least_float32
from rondo.models.mixer import SequenceContext, State, get
from rondo.models.mixers.attention import Attention, AttentionOptions
from rondo.models.registry import MIXERS


@dataclass
class LigerOptions(AttentionOptions):
    """Hyper-parameters of `liger`: those of the attention that it was, whose window it keeps."""

    window: int | None = 64
    """Keys a query sees in the window branch, itself included; None: all before it."""
    gate_divisor: float = 16.0
    """The log decay is divided by this: 1 forgets within about two tokens at the start, 16 within
    about two dozen."""
    recurrent_share: float = field(default=0.5, metadata={"zero": True})
    """Factor of what the recurrence finds."""
    window_share: float = field(default=0.5, metadata={"zero": True})
    """Factor of what the window finds. 1, with a recurrent_share of 0 and no window: attention."""


@MIXERS.register("liger")
class Liger(Attention):
    """Liger's gated linear attention (arXiv 2503.01496), which has no parameter that attention has
    not: with q, k, v as attention projects them, before RoPE,

        G_t = σ(k_t)^(1/16)     S_t = diag(G_t) S_{t-1} + softmax(k_t) v_tᵀ
        o_t = ½ softmax(q_t) S_t + ½ attention(q, k, v)_t

    a head, softmax over its channels, attention over a sliding window with RoPE. Keys and values
    of grouped heads serve each of their queries' heads. The paper pools keys into the gate; its
    released form of this variant pools to as many channels as there are, so that nothing is pooled.

    State: `recurrent` `(B, num_heads, head_dim, head_dim)` float32, and what attention keeps of its
    window.
    """

    Options = LigerOptions

    def __init__(self, config: ModelConfig, options: LigerOptions, layer: int) -> None:
        super().__init__(config, options, layer)
        self.scan = gated_linear_attention

    def forward(
        self, x: Tensor, ctx: SequenceContext, state: State | None = None
    ) -> tuple[Tensor, State]:
        q, k, v = self.project(x)
        seen, after = self.read(q, k, v, ctx, state)
        group = q.shape[2] // k.shape[2]
        k, v = (y.repeat_interleave(group, dim=2) for y in (k, v))
        found, recurrent = self.scan(
            q.softmax(-1),
            k.softmax(-1),
            v,
            F.logsigmoid(at_least_float32(k)) / self.options.gate_divisor,
            scale=1.0,
            initial_state=get(state, "recurrent"),
            segment_ids=ctx.segment_ids,
        )
        o = self.options.recurrent_share * found + self.options.window_share * seen.o
        return self.write(x, o), {**after, "recurrent": recurrent}

    def state_shapes(
        self, batch: int, length: int
    ) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        square = (batch, self.num_heads, self.head_dim, self.head_dim)
        return {**super().state_shapes(batch, length), "recurrent": (square, torch.float32)}

    def operator_flops(self, length: int) -> float:
        recurrence = 4.0 * self.num_heads * self.head_dim**2
        return super().operator_flops(length) + recurrence
