"""SwiGLU (arXiv 2002.05202): `W_down (SiLU(W_gate x) · W_up x)`."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from rondo.kernels import swiglu
from rondo.models.config import ModelConfig
from rondo.models.layers import Linear
from rondo.models.mixer import ChannelMixer
from rondo.models.registry import FFNS


@FFNS.register("swiglu")
class SwiGLU(ChannelMixer):
    """Gated channel mixer of inner width `config.inner_dim`."""

    sharding: ClassVar = {"gate_proj": "column", "up_proj": "column", "down_proj": "row"}

    @classmethod
    def splits(cls, config: ModelConfig) -> dict[str, int]:
        return {"ffn_dim": config.inner_dim}

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.dim, config.inner_dim, std=config.init_std)
        self.up_proj = Linear(config.dim, config.inner_dim, std=config.init_std)
        self.down_proj = Linear(config.inner_dim, config.dim, std=config.residual_std)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))
