"""HGRN2: a gated linear recurrence whose key is what its forget gate lets go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rondo.kernels import gated_linear_attention
from rondo.models.config import ModelConfig
from rondo.models.init import constant, parameter
from rondo.models.layers import Linear, RMSNorm, at_least_float32
from rondo.models.mixer import Mixer, SequenceContext, State, get, split_heads
from rondo.models.registry import MIXERS


@dataclass
class HGRN2Options:
    """Hyper-parameters of `hgrn2`."""

    head_dim: int | None = None
    """Width of a head; None: 128, or dim where that is less."""


class LowerBounds(nn.Module):
    """Lower bounds of the forget gates by layer: a cumulative softmax over depth, so that upper
    layers remember longer (HGRN, arXiv 2311.04823). At the start layer l of L has l / L."""

    float32_parameters: ClassVar = ("logits",)

    def __init__(self, layers: int, dim: int) -> None:
        super().__init__()
        self.logits = parameter((layers, dim), constant(0.0))

    def forward(self) -> Tensor:
        """`(layers, dim)` float32 in [0, 1), growing with depth, 0 in layer 0."""
        share = at_least_float32(self.logits).softmax(0)
        return share.cumsum(0) - share[0]


@MIXERS.register("hgrn2")
class HGRN2(Mixer):
    """HGRN2 (arXiv 2404.07904): `S_t = diag(f_t) S_{t-1} + (1 - f_t) v_tᵀ`,
    `f = b + (1 - b) sigmoid(W_f x)` with the layer's lower bound b, `q = SiLU(W_q x)`.
    State: `recurrent` `(B, H, K, V)` float32."""

    Options = HGRN2Options
    sharding: ClassVar = {
        "q_proj": "column",
        "f_proj": "column",
        "v_proj": "column",
        "norm": "head",
        "o_proj": "row",
    }

    def __init__(self, config: ModelConfig, options: HGRN2Options, layer: int) -> None:
        super().__init__(config, options, layer)
        self.head_dim = _head_dim(config, options)
        self.scan = gated_linear_attention
        self.q_proj = Linear(config.dim, config.dim, std=config.init_std)
        self.f_proj = Linear(config.dim, config.dim, std=config.init_std)
        self.v_proj = Linear(config.dim, config.dim, std=config.init_std)
        self.norm = RMSNorm(config.dim, config)
        self.o_proj = Linear(config.dim, config.dim, std=config.residual_std)

    @classmethod
    def problems(cls, config: ModelConfig, options: HGRN2Options) -> list[str]:
        head_dim = _head_dim(config, options)
        if head_dim < 1 or config.dim % head_dim:
            return [f"head_dim: model.dim {config.dim} is not divisible by {head_dim}"]
        return []

    @classmethod
    def heads(cls, config: ModelConfig, options: HGRN2Options) -> dict[str, int]:
        return {"head_dim": config.dim // _head_dim(config, options)}

    @classmethod
    def shared_modules(cls, config: ModelConfig, options: HGRN2Options) -> dict[str, nn.Module]:
        return {"hgrn2_lower_bounds": LowerBounds(config.num_layers, config.dim)}

    def forward(
        self, x: Tensor, ctx: SequenceContext, state: State | None = None
    ) -> tuple[Tensor, State]:
        forget = at_least_float32(self.f_proj(x))
        if self.layer == 0:  # its bound is 0 and needs no logarithm
            log_decay = F.logsigmoid(forget)
        else:
            bound = ctx.shared["hgrn2_lower_bounds"][self.layer]
            bound = bound.narrow(0, self.first_head * self.head_dim, forget.shape[-1])
            log_decay = (bound + (1 - bound) * forget.sigmoid()).clamp_min(1e-20).log()
        k = -torch.expm1(log_decay)
        o, recurrent = self.scan(
            split_heads(F.silu(self.q_proj(x)), self.head_dim),
            split_heads(k.to(x.dtype), self.head_dim),
            split_heads(self.v_proj(x), self.head_dim),
            split_heads(log_decay, self.head_dim),
            initial_state=get(state, "recurrent"),
            segment_ids=ctx.segment_ids,
        )
        return self.o_proj(self.norm(o.flatten(2))), {"recurrent": recurrent}

    def state_shapes(
        self, batch: int, length: int
    ) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        width = self.head_dim
        return {"recurrent": ((batch, self.config.dim // width, width, width), torch.float32)}

    def operator_flops(self, length: int) -> float:
        return 4.0 * self.config.dim * self.head_dim


def _head_dim(config: ModelConfig, options: HGRN2Options) -> int:
    return options.head_dim or min(128, config.dim)
