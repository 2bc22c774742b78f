"""Normalisation over the last dim: RMS norm (plain and gated) and L2 norm.

All compute in float32 (float64 for float64 inputs) and return the dtype of `x`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rondo.kernels.backend import choose, triton_refusal
from rondo.kernels.norms_fused import activate, fused_gated_norm, fused_norm, widen

ACTIVATIONS = ("silu", "sigmoid")
TRITON_WIDTH = 8192
"""The longest row that a program of the Triton kernel holds."""


def rms_norm(
    x: Tensor, weight: Tensor | None = None, *, eps: float = 1e-6, backend: str = "auto"
) -> Tensor:
    """`x * rsqrt(mean(x^2) + eps) * weight` (Zhang and Sennrich 2019).

    Args:
        x: `(..., D)`.
        weight: `(D,)`, or None for ones.
        eps: added to the mean square.
        backend: "auto", "reference", "chunked" or "triton".

    Raises:
        ValueError: the shape of weight, eps or backend does not fit.
    """
    _check("rms_norm", x, weight, eps)
    run = choose("rms_norm", backend, NORMS, x.device, _refusal(x, weight))
    return run(x, weight, eps, x.shape[-1])


def l2_norm(x: Tensor, *, eps: float = 1e-6, backend: str = "auto") -> Tensor:
    """`x * rsqrt(sum(x^2) + eps)` over the last dim of `(..., D)`.

    Raises:
        ValueError: eps or backend does not fit.
    """
    _check("l2_norm", x, None, eps)
    run = choose("l2_norm", backend, NORMS, x.device, _refusal(x, None))
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
        backend: "auto", "reference", "chunked" or "triton".

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
    run = choose("gated_rms_norm", backend, GATED_NORMS, x.device, _refusal(x, weight, gate))
    return run(x, gate, weight, eps, activation == "silu", norm_before_gate)


def _check(operator: str, x: Tensor, weight: Tensor | None, eps: float) -> None:
    if weight is not None and weight.shape != x.shape[-1:]:
        raise ValueError(
            f"{operator}: weight {tuple(weight.shape)} must be {tuple(x.shape[-1:])}, "
            f"the last dim of x {tuple(x.shape)}"
        )
    if not eps >= 0:
        raise ValueError(f"{operator}: eps must not be negative, got {eps}")


def _refusal(x: Tensor, *others: Tensor | None) -> str | None:
    """Why the Triton kernel cannot run, or None."""
    if not 1 <= x.shape[-1] <= TRITON_WIDTH:
        return f"it takes rows of 1 to {TRITON_WIDTH} numbers, got {x.shape[-1]}"
    return triton_refusal(x, *others)


def _triton(*arguments: Any) -> Tensor:
    from rondo.kernels.norms_triton import triton_norm

    return triton_norm(*arguments)


def _gated_triton(*arguments: Any) -> Tensor:
    from rondo.kernels.norms_triton import triton_gated_norm

    return triton_gated_norm(*arguments)


def _reference(x: Tensor, weight: Tensor | None, eps: float, count: int) -> Tensor:
    wide = widen(x)
    y = wide * torch.rsqrt(wide.square().sum(dim=-1, keepdim=True) / count + eps)
    return (y if weight is None else y * weight).to(x.dtype)


def _gated_reference(
    x: Tensor, gate: Tensor, weight: Tensor | None, eps: float, silu: bool, norm_before_gate: bool
) -> Tensor:
    wide, act = widen(x), activate(widen(gate), silu)
    if norm_before_gate:
        return (_reference(wide, weight, eps, x.shape[-1]) * act).to(x.dtype)
    return _reference(wide * act, weight, eps, x.shape[-1]).to(x.dtype)


NORMS = {"reference": _reference, "chunked": fused_norm, "triton": _triton}
GATED_NORMS = {
    "reference": _gated_reference,
    "chunked": fused_gated_norm,
    "triton": _gated_triton,
}
