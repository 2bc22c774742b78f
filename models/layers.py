"""The small modules that mixers and blocks are made of."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rondo.kernels import gated_rms_norm, rms_norm, short_conv
from rondo.models.config import ModelConfig
from rondo.models.init import Initializer, constant, normal, parameter, uniform


class Linear(nn.Module):
    """`y = x Wᵀ + b`, computed in the dtype of `x`; the weight itself stays in its own."""

    def __init__(
        self, inputs: int, outputs: int, *, std: float, bias: Initializer | None = None
    ) -> None:
        super().__init__()
        self.inputs, self.outputs = inputs, outputs  # an engine may keep a weight elsewhere
        self.weight = parameter((outputs, inputs), normal(std))
        self.bias = parameter((outputs,), bias) if bias is not None else None

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)

    def extra_repr(self) -> str:
        return f"{self.inputs} -> {self.outputs}, bias={self.bias is not None}"


class Embedding(nn.Module):
    """Rows of a table by token id."""

    def __init__(self, rows: int, dim: int, *, std: float) -> None:
        super().__init__()
        self.operator: Callable[[Tensor, Tensor], Tensor] = F.embedding
        self.weight = parameter((rows, dim), normal(std))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.operator(tokens, self.weight)


class RMSNorm(nn.Module):
    """RMSNorm over the last dimension, float32 inside, times `weight`; times 1 + `offset` where
    norms of the model are zero-centred. Two names, so that neither is ever read as the other."""

    def __init__(self, dim: int, config: ModelConfig) -> None:
        super().__init__()
        self.eps, self.width = config.norm_eps, dim
        self.operator: Callable[..., Tensor] = rms_norm
        self.zero_centered = config.zero_centered_norms
        if self.zero_centered:
            self.offset = parameter((dim,), constant(0.0))
        else:
            self.weight = parameter((dim,), constant(1.0))

    def forward(self, x: Tensor) -> Tensor:
        weight = 1 + at_least_float32(self.offset) if self.zero_centered else self.weight
        return self.operator(x, weight, eps=self.eps)


class GatedRMSNorm(nn.Module):
    """RMSNorm with a gate: `norm(x)·act(gate)`, or `norm(x·act(gate))` as Mamba-2 does.

    `width`: channels that are normalised together, a divisor of `dim`; None for all.
    """

    def __init__(
        self, dim: int, eps: float, *, norm_before_gate: bool = True, width: int | None = None
    ) -> None:
        super().__init__()
        self.eps, self.width = eps, width or dim
        self.norm_before_gate = norm_before_gate
        self.operator: Callable[..., Tensor] = gated_rms_norm
        self.weight = parameter((dim,), constant(1.0))

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        options = {"eps": self.eps, "norm_before_gate": self.norm_before_gate}
        if self.width >= self.weight.shape[0]:  # one group, or a part of one
            return self.operator(x, gate, self.weight, **options)
        x, gate = (y.unflatten(-1, (-1, self.width)) for y in (x, gate))
        return self.operator(x, gate, **options).flatten(-2) * self.weight.to(x.dtype)


class ShortConv(nn.Module):
    """Weights of a causal depthwise convolution; the mixer's `conv` operator applies them."""

    def __init__(self, channels: int, width: int, *, bias: bool = False) -> None:
        super().__init__()
        bound = width**-0.5  # torch's default for a convolution with one input channel
        self.weight = parameter((channels, width), uniform(-bound, bound))
        self.bias = parameter((channels,), uniform(-bound, bound)) if bias else None

    def forward(
        self,
        x: Tensor,
        operator: Callable[..., tuple[Tensor, Tensor]] = short_conv,
        *,
        initial_state: Tensor | None = None,
        segment_ids: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """SiLU(conv(x)) and the last inputs. `x`: `(B, T, channels)`."""
        return operator(
            x,
            self.weight,
            self.bias,
            activation="silu",
            initial_state=initial_state,
            segment_ids=segment_ids,
        )


def at_least_float32(x: Tensor) -> Tensor:
    """`x` in float32, or as it is in float64: for gates, whose small steps bfloat16 would round
    away."""
    return x if x.dtype == torch.float64 else x.float()
