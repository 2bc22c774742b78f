"""What every router owes: scores of the experts, and what it hands to the router above."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from rondo.models.config import ModelConfig
from rondo.models.init import constant, normal, parameter
from rondo.models.mixer import module_cost

Carry = dict[str, Tensor]


class Router(nn.Module):
    """Base of the routers.

    A subclass sets `Options` (a dataclass of its hyper-parameters) and writes `forward`. All its
    parameters stay float32, and so does its input. What it hands to the router of the next
    mixture, it names in `carried`.
    """

    Options: ClassVar[type]

    def __init__(self, config: ModelConfig, options: Any, experts: int) -> None:
        super().__init__()
        self.options = options

    @property
    def float32_parameters(self) -> tuple[str, ...]:
        """All of them: depth multiplies what rounding changes in a router."""
        return tuple(name for name, _ in self.named_parameters())

    @classmethod
    def carried(cls, config: ModelConfig, options: Any, experts: int) -> dict[str, int]:
        """As `ChannelMixer.carried`."""
        return {}

    @classmethod
    def shared_modules(cls, config: ModelConfig, options: Any) -> dict[str, nn.Module]:
        """As `Mixer.shared_modules`."""
        return {}

    @classmethod
    def problems(cls, options: Any) -> list[str]:
        """What makes `options` impossible; each "option: reason"."""
        return []

    def forward(self, x: Tensor, carry: Carry, shared: dict[str, Any]) -> tuple[Tensor, Carry]:
        """Logits `(B, T, experts)` of `x` `(B, T, dim)`, and what to carry on; all float32 (or
        float64)."""
        raise NotImplementedError

    def flops(self) -> float:
        """Forward FLOPs a token."""
        return module_cost(self).flops


class CosineScores(nn.Module):
    """`cos(x, E_e) / τ` with a learned temperature τ, held as `log(1 / τ)`."""

    def __init__(self, inputs: int, experts: int, *, std: float, temperature: float) -> None:
        super().__init__()
        self.weight = parameter((experts, inputs), normal(std))
        self.log_scale = parameter((1,), constant(-math.log(temperature)))

    def forward(self, x: Tensor) -> Tensor:
        scores = F.linear(F.normalize(x, dim=-1), F.normalize(self.weight, dim=-1))
        return scores * self.log_scale.exp()
