"""`linear`: one matrix; and `random`: one that stays as it was drawn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from rondo.models.config import ModelConfig
from rondo.models.ffn.router import Carry, Projection, Router
from rondo.models.registry import ROUTERS


@dataclass
class LinearOptions:
    """No hyper-parameters."""


@ROUTERS.register("linear")
class LinearRouter(Router):
    """`a = G x` (arXiv 1701.06538, 2101.03961)."""

    Options: ClassVar[type] = LinearOptions

    def __init__(self, config: ModelConfig, options: Any, experts: int) -> None:
        super().__init__(config, options, experts)
        self.scores = Projection(config.dim, experts, std=config.init_std)

    def forward(self, x: Tensor, carry: Carry, shared: dict[str, Any]) -> tuple[Tensor, Carry]:
        return self.scores(x), carry


@ROUTERS.register("random")
class RandomRouter(LinearRouter):
    """`linear`, frozen at its initial value: how much routing itself is worth."""

    def __init__(self, config: ModelConfig, options: Any, experts: int) -> None:
        super().__init__(config, options, experts)
        self.requires_grad_(False)
