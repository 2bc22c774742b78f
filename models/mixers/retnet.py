"""RetNet: linear attention with one fixed decay a head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rondo.kernels import gated_linear_attention, rope
from rondo.models.config import ModelConfig
from rondo.models.layers import GatedRMSNorm, Linear, at_least_float32
from rondo.models.mixer import Mixer, SequenceContext, State, get, split_heads
from rondo.models.registry import MIXERS


@dataclass
class RetNetOptions:
    """Hyper-parameters of `retnet`."""

    num_heads: int | None = None
    """Heads; None: dim / 256, at least 1."""
    expand_v: float = 2.0
    """Width of all values over dim."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""


@MIXERS.register("retnet")
class RetNet(Mixer):
    """Multi-scale retention (arXiv 2307.08621): `S_t = γ_h S_{t-1} + k_t v_tᵀ`,
    `γ_h = 1 - 2^(-5-h)`, with RoPE on queries and keys.
    State: `recurrent` `(B, H, K, V)` float32."""

    Options = RetNetOptions
    sharding: ClassVar = {
        "q_proj": "column",
        "k_proj": "column",
        "v_proj": "column",
        "gate_proj": "column",
        "norm": "replicate",
        "o_proj": "row",
    }

    def __init__(self, config: ModelConfig, options: RetNetOptions, layer: int) -> None:
        super().__init__(config, options, layer)
        self.num_heads, self.values = _sizes(config, options)
        self.scan = gated_linear_attention
        std = config.init_std
        self.q_proj = Linear(config.dim, config.dim, std=std)
        self.k_proj = Linear(config.dim, config.dim, std=std)
        self.v_proj = Linear(config.dim, self.values, std=std)
        self.gate_proj = Linear(config.dim, self.values, std=std)
        self.norm = GatedRMSNorm(self.values // self.num_heads, config.norm_eps)
        self.o_proj = Linear(self.values, config.dim, std=config.residual_std)

    @classmethod
    def problems(cls, config: ModelConfig, options: RetNetOptions) -> list[str]:
        heads, values = _sizes(config, options)
        found = [
            f"num_heads: {width} {what} channels are not divisible by {heads} heads"
            for what, width in (("key", config.dim), ("value", values))
            if width < 1 or width % heads
        ]
        if not found and config.dim // heads % 2:
            found.append(f"num_heads: RoPE needs an even head width, got {config.dim // heads}")
        return found

    @classmethod
    def heads(cls, config: ModelConfig, options: RetNetOptions) -> dict[str, int]:
        return {"num_heads": _sizes(config, options)[0]}

    def forward(
        self, x: Tensor, ctx: SequenceContext, state: State | None = None
    ) -> tuple[Tensor, State]:
        key_dim, value_dim = (n // self.num_heads for n in (self.config.dim, self.values))
        q, k = (split_heads(proj(x), key_dim) for proj in (self.q_proj, self.k_proj))
        v, gate = (split_heads(proj(x), value_dim) for proj in (self.v_proj, self.gate_proj))
        theta = self.options.rope_theta
        heads = self.first_head + torch.arange(v.shape[2], device=x.device)
        log_decay = torch.log1p(-torch.exp2(-5.0 - heads.to(at_least_float32(x).dtype)))
        o, recurrent = self.scan(
            rope(q, ctx.positions, theta=theta),
            rope(k, ctx.positions, theta=theta),
            v,
            log_decay.expand(*x.shape[:2], -1),
            initial_state=get(state, "recurrent"),
            segment_ids=ctx.segment_ids,
        )
        return self.o_proj(self.norm(o, gate).flatten(2)), {"recurrent": recurrent}

    def state_shapes(
        self, batch: int, length: int
    ) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        key, value = self.config.dim // self.num_heads, self.values // self.num_heads
        return {"recurrent": ((batch, self.num_heads, key, value), torch.float32)}

    def operator_flops(self, length: int) -> float:
        return 4.0 * self.config.dim * self.values / self.num_heads


def _sizes(config: ModelConfig, options: RetNetOptions) -> tuple[int, int]:
    heads = max(1, options.num_heads or config.dim // 256)
    return heads, int(config.dim * options.expand_v)
