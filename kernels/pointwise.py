"""Elementwise operators."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def soft_cap(x: Tensor, cap: float | None) -> Tensor:
    """`cap tanh(x / cap)`, between -cap and cap and close to x where that is small; x itself where
    there is no cap (Gemma 2, arXiv 2408.00118; xLSTM 7B, arXiv 2503.13427). Computed in at least
    float32, returned in the dtype of x."""
    if cap is None:
        return x
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (cap * torch.tanh(wide / cap)).to(x.dtype)


def soft_cap_difference_(x: Tensor, shift: Tensor, cap: float | None) -> Tensor | None:
    """Turns x in place into `soft_cap(x + shift) - soft_cap(shift)`, computed in the dtype of x.

    Returns:
        The derivative by x, `1 - tanh((x + shift) / cap)²`; None where there is no cap, and
        nothing changes.
    """
    if cap is None:
        return None
    slope = x.add_(shift).div_(cap).tanh_().square().neg_().add_(1.0)
    x.mul_(cap).sub_(soft_cap(shift.to(x.dtype), cap))
    return slope


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up`, both of one shape and dtype (Shazeer 2020, "GLU variants").

    Only the inputs are kept for the backward pass.

    Raises:
        ValueError: shapes or dtypes differ.
    """
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(
            f"swiglu: gate {tuple(gate.shape)} {gate.dtype} and up {tuple(up.shape)} {up.dtype} "
            "must have one shape and dtype"
        )
    return _SwiGLU.apply(gate, up)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)
