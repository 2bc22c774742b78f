"""`cosine`: the angle to each expert's vector; `xmoe`: the same in few dimensions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from rondo.models.config import ModelConfig
from rondo.models.ffn.router import Carry, CosineScores, Projection, Router
from rondo.models.registry import ROUTERS


@dataclass
class CosineOptions:
    """Hyper-parameters of `cosine`."""

    temperature: float = 0.3
    """The learned temperature's initial value."""


@dataclass
class XMoEOptions(CosineOptions):
    """Hyper-parameters of `xmoe`."""

    dim: int = 16
    """Width that tokens are projected to."""


@ROUTERS.register("cosine")
class CosineRouter(Router):
    """`a_e = cos(x, E_e) / τ`."""

    Options: ClassVar[type] = CosineOptions

    def __init__(self, config: ModelConfig, options: Any, experts: int) -> None:
        super().__init__(config, options, experts)
        self.scores = CosineScores(
            config.dim, experts, std=config.init_std, temperature=options.temperature
        )

    def forward(self, x: Tensor, carry: Carry, shared: dict[str, Any]) -> tuple[Tensor, Carry]:
        return self.scores(x), carry

    def flops(self) -> float:
        return super().flops() + 2 * self.scores.weight.numel()


@ROUTERS.register("xmoe")
class XMoERouter(CosineRouter):
    """`a_e = cos(P x, E_e) / τ` (arXiv 2204.09179)."""

    Options: ClassVar[type] = XMoEOptions

    def __init__(self, config: ModelConfig, options: Any, experts: int) -> None:
        Router.__init__(self, config, options, experts)
        self.proj = Projection(config.dim, options.dim, std=config.init_std)
        self.scores = CosineScores(
            options.dim, experts, std=config.init_std, temperature=options.temperature
        )

    def forward(self, x: Tensor, carry: Carry, shared: dict[str, Any]) -> tuple[Tensor, Carry]:
        return self.scores(self.proj(x)), carry
