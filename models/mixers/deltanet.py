"""DeltaNet: a linear recurrence that overwrites what it stored under a key."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from rondo.kernels import gated_delta_rule, l2_norm, short_conv
from rondo.models.config import ModelConfig
from rondo.models.layers import GatedRMSNorm, Linear, RMSNorm, ShortConv, at_least_float32
from rondo.models.mixer import Mixer, SequenceContext, State, get, split_heads
from rondo.models.registry import MIXERS


@dataclass
class DeltaNetOptions:
    """Hyper-parameters of `deltanet`."""

    num_heads: int | None = None
    """Heads; None: dim / head_dim."""
    head_dim: int | None = None
    """Width of queries and keys in a head; None: 128, or dim / 2 where that is less."""
    expand_v: float = 1.0
    """Width of values in a head over head_dim."""
    conv_width: int = 4
    """Taps of the short convolution on queries, keys and values."""
    negative_eigenvalues: bool = False
    """Let beta range over [0, 2], so that a step can reflect (arXiv 2411.12537)."""
    output_gate: bool = False
    """Multiply the normalised output by SiLU of a projection of the input."""


@MIXERS.register("deltanet")
class DeltaNet(Mixer):
    """DeltaNet (arXiv 2406.06484): `S_t = (I - β k kᵀ) S_{t-1} + β k vᵀ` with unit keys.

    State: `recurrent` `(B, H, K, V)` float32, and the last inputs of the three convolutions,
    `conv_q`, `conv_k`, `conv_v`, each `(B, conv_width - 1, channels)`.
    """

    Options: ClassVar[type] = DeltaNetOptions
    sharding: ClassVar = {
        "q_proj": "column",
        "k_proj": "column",
        "v_proj": "column",
        "beta_proj": "column",
        "gate_proj": "column",
        "q_conv": "head",
        "k_conv": "head",
        "v_conv": "head",
        "norm": "replicate",
        "o_proj": "row",
    }

    def __init__(self, config: ModelConfig, options: Any, layer: int) -> None:
        super().__init__(config, options, layer)
        self.num_heads, self.head_dim, self.value_dim = self.sizes(config, options)
        self.scan, self.conv = gated_delta_rule, short_conv
        keys, values = self.num_heads * self.head_dim, self.num_heads * self.value_dim
        std = config.init_std
        self.q_proj = Linear(config.dim, keys, std=std)
        self.k_proj = Linear(config.dim, keys, std=std)
        self.v_proj = Linear(config.dim, values, std=std)
        self.beta_proj = Linear(config.dim, self.num_heads, std=std)
        self.q_conv = ShortConv(keys, options.conv_width)
        self.k_conv = ShortConv(keys, options.conv_width)
        self.v_conv = ShortConv(values, options.conv_width)
        if options.output_gate:
            self.gate_proj = Linear(config.dim, values, std=std)
            self.norm = GatedRMSNorm(self.value_dim, config.norm_eps)
        else:
            self.norm = RMSNorm(self.value_dim, config)
        self.o_proj = Linear(values, config.dim, std=config.residual_std)

    @classmethod
    def sizes(cls, config: ModelConfig, options: Any) -> tuple[int, int, int]:
        """Heads, key width and value width of a head."""
        head_dim = options.head_dim or min(128, max(1, config.dim // 2))
        heads = options.num_heads or max(1, config.dim // head_dim)
        return heads, head_dim, int(head_dim * options.expand_v)

    @classmethod
    def problems(cls, config: ModelConfig, options: Any) -> list[str]:
        if cls.sizes(config, options)[2] < 1:
            return [f"expand_v: leaves no value channels, got {options.expand_v}"]
        return []

    @classmethod
    def heads(cls, config: ModelConfig, options: Any) -> dict[str, int]:
        return {"num_heads": cls.sizes(config, options)[0]}

    def forward(
        self, x: Tensor, ctx: SequenceContext, state: State | None = None
    ) -> tuple[Tensor, State]:
        after: State = {}
        q, k, v = (
            split_heads(self._convolve(name, x, ctx, state, after), width)
            for name, width in (("q", self.head_dim), ("k", self.head_dim), ("v", self.value_dim))
        )
        beta = at_least_float32(self.beta_proj(x)).sigmoid()
        if self.options.negative_eigenvalues:
            beta = 2 * beta
        o, after["recurrent"] = self.scan(
            l2_norm(q),
            l2_norm(k),
            v,
            beta,
            self.log_decay(x),
            initial_state=get(state, "recurrent"),
            segment_ids=ctx.segment_ids,
        )
        if self.options.output_gate:
            o = self.norm(o, split_heads(self.gate_proj(x), self.value_dim))
        else:
            o = self.norm(o)
        return self.o_proj(o.flatten(2)), after

    def log_decay(self, x: Tensor) -> Tensor | None:
        """Log of the factor the state shrinks by before each token; None: it does not."""
        return None

    def _convolve(
        self, name: str, x: Tensor, ctx: SequenceContext, state: State | None, after: State
    ) -> Tensor:
        projection, conv = getattr(self, f"{name}_proj"), getattr(self, f"{name}_conv")
        y, after[f"conv_{name}"] = conv(
            projection(x),
            self.conv,
            initial_state=get(state, f"conv_{name}"),
            segment_ids=ctx.segment_ids,
        )
        return y

    def state_shapes(
        self, batch: int, length: int
    ) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        taps = self.options.conv_width - 1
        keys, values = self.num_heads * self.head_dim, self.num_heads * self.value_dim
        return {
            "recurrent": ((batch, self.num_heads, self.head_dim, self.value_dim), torch.float32),
            "conv_q": ((batch, taps, keys), torch.bfloat16),
            "conv_k": ((batch, taps, keys), torch.bfloat16),
            "conv_v": ((batch, taps, values), torch.bfloat16),
        }

    def operator_flops(self, length: int) -> float:
        state = self.num_heads * self.head_dim * self.value_dim
        conv = 2 * self.options.conv_width * self.num_heads * (2 * self.head_dim + self.value_dim)
        return 6.0 * state + conv  # read the old value, write the new one, read out
