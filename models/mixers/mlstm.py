"""mLSTM: a matrix memory with exponential input gates, in the two blocks that xLSTM has for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from rondo.kernels import mlstm, rms_norm, short_conv, soft_cap
from rondo.kernels.mlstm import mlstm_state_size
from rondo.models.config import ModelConfig
from rondo.models.init import Initializer, constant, normal, parameter
from rondo.models.layers import Linear, ShortConv, at_least_float32
from rondo.models.mixer import Mixer, SequenceContext, State, get, split_heads
from rondo.models.registry import MIXERS


@dataclass
class MLSTMOptions:
    """Hyper-parameters of `mlstm`."""

    num_heads: int = 4
    """Heads."""
    expand: int = 2
    """Inner width over dim."""
    block_size: int = 4
    """Channels that queries, keys and values mix among themselves."""
    conv_width: int = 4
    """Taps of the short convolution in front of queries and keys."""


@dataclass
class MLSTMFlatOptions:
    """Hyper-parameters of `mlstm_flat`."""

    num_heads: int = 4
    """Heads."""
    key_factor: float = 0.5
    """Width of queries and keys over that of values, dim / num_heads."""
    gate_cap: float = 15.0
    """Limit a of what reaches the gates: a tanh(x / a)."""


@MIXERS.register("mlstm")
class MLSTM(Mixer):
    """The mLSTM block of xLSTM (arXiv 2405.04517), which needs no channel mixer: with
    w = W_x x and u = SiLU(conv(w)),

        q, k = B_q u, B_k u      v = B_v w      h = mlstm(q, k, v, gates of q, k, v)
        y = W_o ((norm(h) + skip · u) · SiLU(W_g x))

    and block-diagonal B_q, B_k, B_v. The gates of a head see the queries, keys and values of that
    head (the paper's those of all), so that heads can be divided; the norm is an RMSNorm a head.

    State: `recurrent` `(B, H, V (V + 1) + 1)` float32 as `kernels.mlstm` has it, and the last
    inputs of the convolution, `conv` `(B, conv_width - 1, inner)`.
    """

    Options: ClassVar[type] = MLSTMOptions
    sharding: ClassVar = {
        "x_proj": "column",
        "gate_proj": "column",
        "x_conv": "head",
        "qkv": "head",
        "gates": "head",
        "input_bias": "head",
        "forget_bias": "head",
        "norm": "head",
        "skip": "head",
        "o_proj": "row",
    }
    float32_parameters: ClassVar = ("input_bias", "forget_bias")

    def __init__(self, config: ModelConfig, options: MLSTMOptions, layer: int) -> None:
        super().__init__(config, options, layer)
        self.scan, self.conv = mlstm, short_conv
        self.inner, heads = options.expand * config.dim, options.num_heads
        self.head_dim = self.inner // heads
        block = options.block_size
        self.x_proj = Linear(config.dim, self.inner, std=config.init_std)
        self.gate_proj = Linear(config.dim, self.inner, std=config.init_std)
        self.x_conv = ShortConv(self.inner, options.conv_width, bias=True)
        shape = (heads, 3, self.head_dim // block, block, block)
        self.qkv = parameter(shape, normal((2 / (5 * block)) ** 0.5))
        self.gates = parameter((heads, 2, 3 * self.head_dim), constant(0.0))
        self.input_bias = parameter((heads,), normal(0.1))
        self.forget_bias = parameter((heads,), _spread(3.0, 6.0))
        self.norm = parameter((heads, self.head_dim), constant(1.0))
        self.skip = parameter((heads, self.head_dim), constant(1.0))
        self.o_proj = Linear(self.inner, config.dim, std=config.residual_std)

    @classmethod
    def problems(cls, config: ModelConfig, options: MLSTMOptions) -> list[str]:
        inner, heads = options.expand * config.dim, options.num_heads
        if inner % heads:
            return [f"num_heads: inner width {inner} is not divisible by {heads}"]
        if inner // heads % options.block_size:
            return [
                f"block_size: heads of width {inner // heads} are not divisible by "
                f"{options.block_size}"
            ]
        return []

    @classmethod
    def heads(cls, config: ModelConfig, options: MLSTMOptions) -> dict[str, int]:
        return {"num_heads": options.num_heads}

    def forward(
        self, x: Tensor, ctx: SequenceContext, state: State | None = None
    ) -> tuple[Tensor, State]:
        after: State = {}
        w = self.x_proj(x)
        u, after["conv"] = self.x_conv(
            w, self.conv, initial_state=get(state, "conv"), segment_ids=ctx.segment_ids
        )
        w, u = split_heads(w, self.head_dim), split_heads(u, self.head_dim)
        q, k, v = (self._mixed(y, part) for part, y in enumerate((u, u, w)))
        scores = torch.einsum("bthi,hgi->bthg", torch.cat((q, k, v), 3), self.gates.to(x.dtype))
        write, forget = at_least_float32(scores).unbind(3)
        h, after["recurrent"] = self.scan(
            q,
            k,
            v,
            write + self.input_bias,
            forget + self.forget_bias,
            initial_state=get(state, "recurrent"),
            segment_ids=ctx.segment_ids,
        )
        y = rms_norm(h, eps=self.config.norm_eps) * self.norm.to(h.dtype)
        y = torch.addcmul(y, u, self.skip.to(h.dtype)).flatten(2)
        return self.o_proj(y * F.silu(self.gate_proj(x))), after

    def _mixed(self, x: Tensor, part: int) -> Tensor:
        """Queries, keys or values `(B, T, H, V)`."""
        blocks = x.unflatten(3, (-1, self.options.block_size))
        weight = self.qkv[:, part].to(x.dtype)
        return torch.einsum("bthni,hnoi->bthno", blocks, weight).flatten(3)

    def state_shapes(
        self, batch: int, length: int
    ) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        size = mlstm_state_size(self.head_dim, self.head_dim)
        return {
            "recurrent": ((batch, self.options.num_heads, size), torch.float32),
            "conv": ((batch, self.options.conv_width - 1, self.inner), torch.bfloat16),
        }

    def operator_flops(self, length: int) -> float:
        """Write and read of C and n, q, k and v, the gates, and the convolution."""
        memory = 4.0 * (self.head_dim + 1)
        return self.inner * (
            memory + 6 * self.options.block_size + 12 + 2 * self.options.conv_width
        )


@MIXERS.register("mlstm_flat")
class MLSTMFlat(Mixer):
    """The mLSTM layer of xLSTM 7B (arXiv 2503.13427), which has a channel mixer behind it and
    neither convolution nor a wider inside: with a(x) = gate_cap tanh(x / gate_cap),

        h = mlstm(W_q x, W_k x, W_v x, a(W_i x + b_i), a(W_f x + b_f))
        y = W_o (norm(h) · σ(W_g x))

    State: `recurrent` `(B, H, K (V + 1) + 1)` float32.
    """

    Options: ClassVar[type] = MLSTMFlatOptions
    sharding: ClassVar = {
        **{f"{name}_proj": "column" for name in ("q", "k", "v", "gate", "input", "forget")},
        "norm": "head",
        "o_proj": "row",
    }
    float32_parameters: ClassVar = ("input_proj.bias", "forget_proj.bias")

    def __init__(self, config: ModelConfig, options: MLSTMFlatOptions, layer: int) -> None:
        super().__init__(config, options, layer)
        self.scan = mlstm
        self.key_dim, self.value_dim = _widths(config, options)
        heads, std = options.num_heads, config.init_std
        self.q_proj = Linear(config.dim, heads * self.key_dim, std=std)
        self.k_proj = Linear(config.dim, heads * self.key_dim, std=std)
        self.v_proj = Linear(config.dim, config.dim, std=std)
        self.gate_proj = Linear(config.dim, config.dim, std=std)
        self.input_proj = Linear(config.dim, heads, std=0.0, bias=normal(0.1))
        self.forget_proj = Linear(config.dim, heads, std=0.0, bias=_spread(3.0, 6.0))
        self.norm = parameter((heads, self.value_dim), constant(1.0))
        self.o_proj = Linear(config.dim, config.dim, std=config.residual_std)

    @classmethod
    def problems(cls, config: ModelConfig, options: MLSTMFlatOptions) -> list[str]:
        if config.dim % options.num_heads:
            return [f"num_heads: dim {config.dim} is not divisible by {options.num_heads}"]
        if _widths(config, options)[0] < 1:
            return [f"key_factor: leaves keys no channels, got {options.key_factor}"]
        return []

    @classmethod
    def heads(cls, config: ModelConfig, options: MLSTMFlatOptions) -> dict[str, int]:
        return {"num_heads": options.num_heads}

    def forward(
        self, x: Tensor, ctx: SequenceContext, state: State | None = None
    ) -> tuple[Tensor, State]:
        h, recurrent = self.scan(
            split_heads(self.q_proj(x), self.key_dim),
            split_heads(self.k_proj(x), self.key_dim),
            split_heads(self.v_proj(x), self.value_dim),
            self._capped(self.input_proj(x)),
            self._capped(self.forget_proj(x)),
            initial_state=get(state, "recurrent"),
            segment_ids=ctx.segment_ids,
        )
        y = rms_norm(h, eps=self.config.norm_eps) * self.norm.to(h.dtype)
        return self.o_proj(y.flatten(2) * torch.sigmoid(self.gate_proj(x))), {
            "recurrent": recurrent
        }

    def _capped(self, x: Tensor) -> Tensor:
        return soft_cap(at_least_float32(x), self.options.gate_cap)

    def state_shapes(
        self, batch: int, length: int
    ) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        size = mlstm_state_size(self.key_dim, self.value_dim)
        return {"recurrent": ((batch, self.options.num_heads, size), torch.float32)}

    def operator_flops(self, length: int) -> float:
        return 4.0 * self.options.num_heads * self.key_dim * (self.value_dim + 1)


def _widths(config: ModelConfig, options: Any) -> tuple[int, int]:
    """Of keys and values in a head."""
    value_dim = config.dim // options.num_heads
    return int(value_dim * options.key_factor), value_dim


def _spread(low: float, high: float) -> Initializer:
    """Evenly over heads: memories of different lengths."""
    return lambda shape, generator: torch.linspace(low, high, shape[0])
