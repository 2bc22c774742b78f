"""Gated linear attention: a decay of its own for every token, head and key channel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from rondo.kernels import gated_linear_attention
from rondo.models.config import ModelConfig
from rondo.models.init import constant
from rondo.models.layers import GatedRMSNorm, Linear, at_least_float32
from rondo.models.mixer import Mixer, SequenceContext, State, get, split_heads
from rondo.models.registry import MIXERS


@dataclass
class GLAOptions:
    """Hyper-parameters of `gla`."""

    num_heads: int = 4
    """Heads."""
    expand_k: float = 0.5
    """Width of all keys over dim."""
    expand_v: float = 1.0
    """Width of all values over dim."""
    gate_rank: int = 16
    """Inner width of the decay's low-rank projection."""
    gate_divisor: float = 16.0
    """The log decay is divided by this, so that the state starts out with a long memory."""


@MIXERS.register("gla")
class GatedLinearAttention(Mixer):
    """GLA (arXiv 2312.06635): `S_t = diag(α_t) S_{t-1} + k_t v_tᵀ` with
    `log α_t = logsigmoid(W₂ W₁ x_t) / 16`. State: `recurrent` `(B, H, K, V)` float32."""

    Options = GLAOptions
    sharding: ClassVar = {
        "q_proj": "column",
        "k_proj": "column",
        "v_proj": "column",
        "gate_proj": "column",
        "decay_down": "replicate",
        "decay_up": "column",
        "norm": "replicate",
        "o_proj": "row",
    }

    def __init__(self, config: ModelConfig, options: GLAOptions, layer: int) -> None:
        super().__init__(config, options, layer)
        self.keys, self.values = _widths(config, options)
        self.scan = gated_linear_attention
        std = config.init_std
        self.q_proj = Linear(config.dim, self.keys, std=std)
        self.k_proj = Linear(config.dim, self.keys, std=std)
        self.v_proj = Linear(config.dim, self.values, std=std)
        self.gate_proj = Linear(config.dim, self.values, std=std)
        self.decay_down = Linear(config.dim, options.gate_rank, std=std)
        self.decay_up = Linear(options.gate_rank, self.keys, std=std, bias=constant(0.0))
        self.norm = GatedRMSNorm(self.values // options.num_heads, config.norm_eps)
        self.o_proj = Linear(self.values, config.dim, std=config.residual_std)

    @classmethod
    def problems(cls, config: ModelConfig, options: GLAOptions) -> list[str]:
        return [
            f"num_heads: {width} {what} channels are not divisible by {options.num_heads} heads"
            for what, width in zip(("key", "value"), _widths(config, options), strict=True)
            if width < 1 or width % options.num_heads
        ]

    @classmethod
    def heads(cls, config: ModelConfig, options: GLAOptions) -> dict[str, int]:
        return {"num_heads": options.num_heads}

    def forward(
        self, x: Tensor, ctx: SequenceContext, state: State | None = None
    ) -> tuple[Tensor, State]:
        key_dim, value_dim = (n // self.options.num_heads for n in (self.keys, self.values))
        decay = F.logsigmoid(at_least_float32(self.decay_up(self.decay_down(x))))
        o, recurrent = self.scan(
            split_heads(self.q_proj(x), key_dim),
            split_heads(self.k_proj(x), key_dim),
            split_heads(self.v_proj(x), value_dim),
            split_heads(decay / self.options.gate_divisor, key_dim),
            initial_state=get(state, "recurrent"),
            segment_ids=ctx.segment_ids,
        )
        o = self.norm(o, split_heads(self.gate_proj(x), value_dim))
        return self.o_proj(o.flatten(2)), {"recurrent": recurrent}

    def state_shapes(
        self, batch: int, length: int
    ) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        heads = self.options.num_heads
        return {
            "recurrent": ((batch, heads, self.keys // heads, self.values // heads), torch.float32)
        }

    def operator_flops(self, length: int) -> float:
        return 4.0 * self.keys * self.values / self.options.num_heads


def _widths(config: ModelConfig, options: GLAOptions) -> tuple[int, int]:
    return int(config.dim * options.expand_k), int(config.dim * options.expand_v)
