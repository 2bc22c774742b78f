"""`mlp`: two layers with GELU between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from rondo.models.config import ModelConfig
from rondo.models.ffn.router import Carry, Projection, Router
from rondo.models.layers import Linear
from rondo.models.registry import ROUTERS


@dataclass
class MLPOptions:
    """Hyper-parameters of `mlp`."""

    dim: int = 256
    """Inner width."""


@ROUTERS.register("mlp")
class MLPRouter(Router):
    """`a = G gelu(P x)`."""

    Options: ClassVar[type] = MLPOptions

    def __init__(self, config: ModelConfig, options: Any, experts: int) -> None:
        super().__init__(config, options, experts)
        self.proj = Projection(config.dim, options.dim, std=config.dim**-0.5)
        self.scores = Linear(options.dim, experts, std=options.dim**-0.5)

    def forward(self, x: Tensor, carry: Carry, shared: dict[str, Any]) -> tuple[Tensor, Carry]:
        return self.scores(F.gelu(self.proj(x))), carry
