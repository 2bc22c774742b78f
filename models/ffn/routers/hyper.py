"""`hyper`: a fixed random network writes the router from a learned vector."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from rondo.models.config import ModelConfig
from rondo.models.ffn.router import Carry, Router, project
from rondo.models.init import normal, parameter
from rondo.models.registry import ROUTERS


@dataclass
class HyperOptions:
    """Hyper-parameters of `hyper`."""

    dim: int = 256
    """Width of the learned vector and of the fixed network."""


@ROUTERS.register("hyper")
class HyperRouter(Router):
    """`a = G x` with `G = B relu(A e)`: e learns, A and B keep their random values
    (HyperRouter, arXiv 2312.07035). Their scales make G start like a `linear` router."""

    Options: ClassVar[type] = HyperOptions

    def __init__(self, config: ModelConfig, options: Any, experts: int) -> None:
        super().__init__(config, options, experts)
        width, self.experts = options.dim, experts
        self.embedding = parameter((width,), normal(1.0))
        self.inner = parameter((width, width), normal((2 / width) ** 0.5))
        self.outer = parameter((experts * config.dim, width), normal(config.init_std * width**-0.5))
        self.inner.requires_grad_(False)
        self.outer.requires_grad_(False)

    def forward(self, x: Tensor, carry: Carry, shared: dict[str, Any]) -> tuple[Tensor, Carry]:
        weight = self.outer @ F.relu(self.inner @ self.embedding)
        return project(x, weight.view(self.experts, -1)), carry

    def flops(self) -> float:
        return 2 * self.outer.shape[0]
