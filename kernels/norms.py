"""Normalisation over the last dim: RMS norm (plain and gated) and L2 norm.

All compute in float32 (float64 for float64 inputs) and return the dtype of `x`. With
`r = rsqrt(sum(x^2) / count + eps)` and `n = x * r`, the gradient of a loss that reaches `n` as `d`
is `r * (d - n * sum(d * n) / count)`; count is the dim for RMS and 1 for L2.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from rondo.kernels.backend import choose

ACTIVATIONS = ("silu", "sigmoid")


def rms_norm(
    x: Tensor, weight: Tensor | None = None, *, eps: float = 1e-6, backend: str = "auto"
) -> Tensor:
    """`x * rsqrt(mean(x^2) + eps) * weight` (Zhang and Sennrich 2019).

    Args:
        x: `(..., D)`.
        weight: `(D,)`, or None for ones.
        eps: added to the mean square.
        backend: "auto", "reference" or "chunked".

    Raises:
        ValueError: the shape of weight, eps or backend does not fit.
    """
    _check("rms_norm", x, weight, eps)
    run = choose("rms_norm", backend, {"reference": _reference, "chunked": _fused}, x.device)
    return run(x, weight, eps, x.shape[-1])


def l2_norm(x: Tensor, *, eps: float = 1e-6, backend: str = "auto") -> Tensor:
    """`x * rsqrt(sum(x^2) + eps)` over the last dim of `(..., D)`.

    Raises:
        ValueError: eps or backend does not fit.
    """
    _check("l2_norm", x, None, eps)
    run = choose("l2_norm", backend, {"reference": _reference, "chunked": _fused}, x.device)
    return run(x, None, eps, 1)


def gated_rms_norm(
    x: Tensor,
    gate: Tensor,
    weight: Tensor | None = None,
    *,
    eps: float = 1e-6,
    activation: str = "silu",
    norm_before_gate: bool = True,
    backend: str = "auto",
) -> Tensor:
    """`rms_norm(x) * act(gate)`, or `rms_norm(x * act(gate))` when not `norm_before_gate`.

    Args:
        x: `(..., D)`; for norms over groups of channels, reshaped by the caller.
        gate: the shape of `x`.
        weight: `(D,)`, or None for ones.
        eps: added to the mean square.
        activation: "silu" or "sigmoid".
        norm_before_gate: True as in Gated DeltaNet, False as in Mamba-2.
        backend: "auto", "reference" or "chunked".

    Raises:
        ValueError: shapes, eps, activation or backend do not fit.
    """
    _check("gated_rms_norm", x, weight, eps)
    if gate.shape != x.shape:
        raise ValueError(
            f"gated_rms_norm: gate {tuple(gate.shape)} must have the shape of x {tuple(x.shape)}"
        )
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"gated_rms_norm: activation must be one of {', '.join(ACTIVATIONS)}, "
            f"got {activation!r}"
        )
    implementations = {"reference": _gated_reference, "chunked": _gated_fused}
    run = choose("gated_rms_norm", backend, implementations, x.device)
    return run(x, gate, weight, eps, activation == "silu", norm_before_gate)


def _check(operator: str, x: Tensor, weight: Tensor | None, eps: float) -> None:
    if weight is not None and weight.shape != x.shape[-1:]:
        raise ValueError(
            f"{operator}: weight {tuple(weight.shape)} must be {tuple(x.shape[-1:])}, "
            f"the last dim of x {tuple(x.shape)}"
        )
    if not eps >= 0:
        raise ValueError(f"{operator}: eps must not be negative, got {eps}")


def _wide(x: Tensor) -> Tensor:
    """At least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _reference(x: Tensor, weight: Tensor | None, eps: float, count: int) -> Tensor:
    wide = _wide(x)
    y = wide * torch.rsqrt(wide.square().sum(dim=-1, keepdim=True) / count + eps)
    return (y if weight is None else y * weight).to(x.dtype)


def _gated_reference(
    x: Tensor, gate: Tensor, weight: Tensor | None, eps: float, silu: bool, norm_before_gate: bool
) -> Tensor:
    wide, act = _wide(x), _activate(_wide(gate), silu)
    if norm_before_gate:
        return (_reference(wide, weight, eps, x.shape[-1]) * act).to(x.dtype)
    return _reference(wide * act, weight, eps, x.shape[-1]).to(x.dtype)


def _activate(gate: Tensor, silu: bool) -> Tensor:
    return F.silu(gate) if silu else torch.sigmoid(gate)


def _activate_backward(grad: Tensor, gate: Tensor, silu: bool) -> Tensor:
    if silu:
        return torch.ops.aten.silu_backward(grad, gate)
    return torch.ops.aten.sigmoid_backward(grad, torch.sigmoid(gate))


def _inverse_norm(x: Tensor, eps: float, count: int) -> Tensor:
    """`(..., 1)` of a wide `x`."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return norm.square_().div_(count).add_(eps).rsqrt_()


def _norm_backward(
    grad: Tensor, normal: Tensor, inverse: Tensor, weight: Tensor | None, count: int
) -> tuple[Tensor, Tensor | None]:
    """Gradients of x and weight for `y = normal * weight`; all wide; reuses `grad`."""
    product = grad * normal
    if weight is None:
        grad_weight, along = None, product.sum(dim=-1, keepdim=True)
    else:
        grad_weight = product.flatten(0, -2).sum(dim=0)
        along = (product @ _wide(weight)).unsqueeze(-1)
        grad = grad.mul_(weight)
    return grad.addcmul_(normal, along, value=-1 / count).mul_(inverse), grad_weight


def _fused(x: Tensor, weight: Tensor | None, eps: float, count: int) -> Tensor:
    return _Norm.apply(x, weight, eps, count)


def _gated_fused(
    x: Tensor, gate: Tensor, weight: Tensor | None, eps: float, silu: bool, norm_before_gate: bool
) -> Tensor:
    function = _NormThenGate if norm_before_gate else _GateThenNorm
    return function.apply(x, gate, weight, eps, silu)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float, count: int) -> Tensor:
        wide = _wide(x)
        inverse = _inverse_norm(wide, eps, count)
        ctx.save_for_backward(x, weight, inverse)
        ctx.count = count
        y = wide * inverse
        if weight is not None:
            y.mul_(weight)
        return y.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        normal = _wide(x) * inverse
        grad_x, grad_weight = _norm_backward(
            grad.to(normal.dtype, copy=True), normal, inverse, weight, ctx.count
        )
        return grad_x.to(x.dtype), _like(grad_weight, weight), None, None


class _NormThenGate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gate: Tensor, weight: Tensor | None, eps: float, silu: bool
    ) -> Tensor:
        wide = _wide(x)
        inverse = _inverse_norm(wide, eps, x.shape[-1])
        ctx.save_for_backward(x, gate, weight, inverse)
        ctx.silu = silu
        y = _activate(_wide(gate), silu).mul_(wide).mul_(inverse)
        if weight is not None:
            y.mul_(weight)
        return y.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, gate, weight, inverse = ctx.saved_tensors
        normal, gate_wide = _wide(x) * inverse, _wide(gate)
        grad_gate = _wide(grad) * normal
        if weight is not None:
            grad_gate.mul_(weight)
        grad_gate = _activate_backward(grad_gate, gate_wide, ctx.silu)
        grad_normal = _activate(gate_wide, ctx.silu).mul_(grad)
        grad_x, grad_weight = _norm_backward(grad_normal, normal, inverse, weight, x.shape[-1])
        return (
            grad_x.to(x.dtype),
            grad_gate.to(gate.dtype),
            _like(grad_weight, weight),
            None,
            None,
        )


class _GateThenNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gate: Tensor, weight: Tensor | None, eps: float, silu: bool
    ) -> Tensor:
        y = _activate(_wide(gate), silu).mul_(x)
        inverse = _inverse_norm(y, eps, x.shape[-1])
        ctx.save_for_backward(x, gate, weight, inverse)
        ctx.silu = silu
        y.mul_(inverse)
        if weight is not None:
            y.mul_(weight)
        return y.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, gate, weight, inverse = ctx.saved_tensors
        gate_wide = _wide(gate)
        act = _activate(gate_wide, ctx.silu)
        normal = (act * x).mul_(inverse)
        grad_gated, grad_weight = _norm_backward(
            grad.to(normal.dtype, copy=True), normal, inverse, weight, x.shape[-1]
        )
        grad_gate = _activate_backward(grad_gated * x, gate_wide, ctx.silu)
        return (
            grad_gated.mul_(act).to(x.dtype),
            grad_gate.to(gate.dtype),
            _like(grad_weight, weight),
            None,
            None,
        )


def _like(grad: Tensor | None, weight: Tensor | None) -> Tensor | None:
    """The gradient in the dtype of what it belongs to."""
    return None if grad is None or weight is None else grad.to(weight.dtype)
