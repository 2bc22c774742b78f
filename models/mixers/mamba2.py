"""Mamba-2: a gated linear recurrence whose keys and queries are shared by groups of heads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from rondo.kernels import gated_linear_attention, short_conv
from rondo.models.config import ModelConfig
from rondo.models.init import constant, inverse_softplus_step, log_uniform, parameter
from rondo.models.layers import GatedRMSNorm, Linear, ShortConv, at_least_float32
from rondo.models.mixer import Mixer, SequenceContext, State, get, split_heads
from rondo.models.registry import MIXERS


@dataclass
class Mamba2Options:
    """Hyper-parameters of `mamba2`."""

    expand: int = 2
    """Inner width over dim."""
    head_dim: int = 64
    """Channels of a head (P)."""
    state_dim: int = 128
    """Size of the state of a channel (N)."""
    num_groups: int = 1
    """Groups of heads that share B and C; the output norm works on each by itself."""
    conv_width: int = 4
    """Taps of the short convolution on x, B and C."""


@MIXERS.register("mamba2")
class Mamba2(Mixer):
    """Mamba-2 (arXiv 2405.21060): `S_t = exp(Δ_t A) S_{t-1} + Δ_t B_t x_tᵀ`,
    `y_t = S_tᵀ C_t + D x_t`, then `W_out norm(y · SiLU(z))`.

    State: `recurrent` `(B, H, N, P)` float32 and the convolutions' last inputs, `conv_x`
    `(B, conv_width - 1, H·P)` and `conv_bc` `(B, conv_width - 1, 2·groups·N)`.
    """

    Options = Mamba2Options
    sharding = {  # noqa: RUF012  (of one group; more groups are split like heads)
        "z_proj": "column",
        "x_proj": "column",
        "bc_proj": "replicate",
        "dt_proj": "column",
        "x_conv": "head",
        "bc_conv": "replicate",
        "dt_bias": "head",
        "A_log": "head",
        "D": "head",
        "norm": "head",
        "o_proj": "row",
    }
    float32_parameters: ClassVar = ("A_log", "dt_bias", "D")

    def __init__(self, config: ModelConfig, options: Mamba2Options, layer: int) -> None:
        super().__init__(config, options, layer)
        self.inner = options.expand * config.dim
        self.num_heads = self.inner // options.head_dim
        self.scan, self.conv = gated_linear_attention, short_conv
        bc, std = 2 * options.num_groups * options.state_dim, config.init_std
        self.z_proj = Linear(config.dim, self.inner, std=std)
        self.x_proj = Linear(config.dim, self.inner, std=std)
        self.bc_proj = Linear(config.dim, bc, std=std)
        self.dt_proj = Linear(config.dim, self.num_heads, std=std)
        self.x_conv = ShortConv(self.inner, options.conv_width, bias=True)
        self.bc_conv = ShortConv(bc, options.conv_width, bias=True)
        self.dt_bias = parameter((self.num_heads,), inverse_softplus_step())
        self.A_log = parameter((self.num_heads,), log_uniform(1, 16))
        self.D = parameter((self.num_heads,), constant(1.0))
        self.norm = GatedRMSNorm(
            self.inner,
            config.norm_eps,
            norm_before_gate=False,
            width=self.inner // options.num_groups,
        )
        if options.num_groups > 1:  # then groups go with their heads
            self.sharding = {**self.sharding, "bc_proj": "column", "bc_conv": "head"}
        self.o_proj = Linear(self.inner, config.dim, std=config.residual_std)

    @classmethod
    def problems(cls, config: ModelConfig, options: Mamba2Options) -> list[str]:
        inner = options.expand * config.dim
        if inner % options.head_dim:
            return [f"head_dim: inner width {inner} is not divisible by {options.head_dim}"]
        heads = inner // options.head_dim
        if heads % options.num_groups:
            return [f"num_groups: {heads} heads are not divisible by {options.num_groups}"]
        return []

    @classmethod
    def heads(cls, config: ModelConfig, options: Mamba2Options) -> dict[str, int]:
        heads = {"head_dim": options.expand * config.dim // options.head_dim}
        return heads if options.num_groups == 1 else {**heads, "num_groups": options.num_groups}

    def forward(
        self, x: Tensor, ctx: SequenceContext, state: State | None = None
    ) -> tuple[Tensor, State]:
        after: State = {}
        segments = {"segment_ids": ctx.segment_ids}
        v, after["conv_x"] = self.x_conv(
            self.x_proj(x), self.conv, initial_state=get(state, "conv_x"), **segments
        )
        bc, after["conv_bc"] = self.bc_conv(
            self.bc_proj(x), self.conv, initial_state=get(state, "conv_bc"), **segments
        )
        v = split_heads(v, self.options.head_dim)
        k, q = bc.unflatten(-1, (-1, 2, self.options.state_dim)).unbind(3)
        step = F.softplus(at_least_float32(self.dt_proj(x)) + self.dt_bias)
        y, after["recurrent"] = self.scan(
            q,
            k,
            v * step[..., None].to(v.dtype),
            -self.A_log.exp() * step,
            scale=1.0,
            initial_state=get(state, "recurrent"),
            **segments,
        )
        y = torch.addcmul(y, v, self.D.to(v.dtype)[:, None])
        return self.o_proj(self.norm(y.flatten(2), self.z_proj(x))), after

    def state_shapes(
        self, batch: int, length: int
    ) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        o, taps = self.options, self.options.conv_width - 1
        return {
            "recurrent": ((batch, self.num_heads, o.state_dim, o.head_dim), torch.float32),
            "conv_x": ((batch, taps, self.inner), torch.bfloat16),
            "conv_bc": ((batch, taps, 2 * o.num_groups * o.state_dim), torch.bfloat16),
        }

    def operator_flops(self, length: int) -> float:
        o = self.options
        conv = 2 * o.conv_width * (self.inner + 2 * o.num_groups * o.state_dim)
        return 4.0 * self.inner * o.state_dim + conv
