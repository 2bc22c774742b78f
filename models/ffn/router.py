"""What every router owes: scores of the experts, and what it hands to the router above."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rondo.models.config import ModelConfig
from rondo.models.init import constant, normal, parameter
from rondo.models.layers import Linear, at_least_float32
from rondo.models.mixer import module_cost

Carry = dict[str, Tensor]


class Router(nn.Module):
    """Base of the routers.

    A subclass sets `Options` (a dataclass of its hyper-parameters) and writes `forward`. Its
    parameters and all that its forward pass computes are float32, also where `x` is not. What it
    hands to the router of the next mixture, it names in `carried`.
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
        """Name and width of what it hands up, as `ChannelMixer.carried`; `experts` is how many
        scores it gives."""
        return {}

    @classmethod
    def shared_modules(cls, config: ModelConfig, options: Any) -> dict[str, nn.Module]:
        """Modules of weights that all layers share; `forward` gets what each module's `forward()`
        returns, by name. Each names its `float32_parameters`."""
        return {}

    @classmethod
    def problems(cls, options: Any) -> list[str]:
        """What makes `options` impossible; each "option: reason"."""
        return []

    def forward(self, x: Tensor, carry: Carry, shared: dict[str, Any]) -> tuple[Tensor, Carry]:
        """Logits `(B, T, experts)` of `x` `(B, T, dim)`, and what to carry on, all float32 (or
        float64); `x` is in the dtype of activations."""
        raise NotImplementedError

    def flops(self) -> float:
        """Forward FLOPs a token."""
        return module_cost(self).flops


class Projection(Linear):
    """`y = x Wᵀ` in float32 of activations in any dtype, which are kept as they are."""

    def forward(self, x: Tensor) -> Tensor:
        return project(x, self.weight)


def project(x: Tensor, weight: Tensor) -> Tensor:
    """`x Wᵀ` in the dtype of `weight`. Its gradients are computed in the dtype of `x`."""
    return _Project.apply(x.flatten(0, -2), weight).unflatten(0, x.shape[:-1])


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x.to(weight.dtype), weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        x, weight = ctx.saved_tensors
        grad = grad.to(x.dtype)
        at_weight = (grad.T @ x).to(weight.dtype) if ctx.needs_input_grad[1] else None
        return grad @ weight.to(x.dtype), at_weight


class CosineScores(nn.Module):
    """`cos(x, E_e) / τ` with a learned temperature τ, held as `log(1 / τ)`."""

    def __init__(self, inputs: int, experts: int, *, std: float, temperature: float) -> None:
        super().__init__()
        self.weight = parameter((experts, inputs), normal(std))
        self.log_scale = parameter((1,), constant(-math.log(temperature)))

    def forward(self, x: Tensor) -> Tensor:
        x = at_least_float32(x)
        scores = F.linear(F.normalize(x, dim=-1), F.normalize(self.weight, dim=-1))
        return scores * self.log_scale.exp()
