"""The memory as a list of matrices: its pieces in one tensor, its gradients, its limits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

Matrices = list[Tensor]


class Limits(NamedTuple):
    """For each matrix by itself: bounds of Frobenius norms, and of the entries of a gradient."""

    update: float
    weight: float
    gradient: float


def sizes(weights: Sequence[Tensor]) -> int:
    """Numbers in the matrices of one head."""
    return sum(math.prod(w.shape[-2:]) for w in weights)


def join(matrices: Sequence[Tensor]) -> Tensor:
    """`(..., P)` of matrices `(..., out, in)`."""
    return torch.cat([m.flatten(-2) for m in matrices], -1)


def split(values: Tensor, like: Sequence[Tensor]) -> Matrices:
    """The inverse of `join`."""
    shapes = [w.shape[-2:] for w in like]
    parts = values.split([math.prod(shape) for shape in shapes], -1)
    return [part.unflatten(-1, shape) for part, shape in zip(parts, shapes, strict=True)]


def recall(weights: Matrices, x: Tensor, residual: bool) -> Tensor:
    """`M(x)` of `x` `(..., C, D)`."""
    y = x
    for i, w in enumerate(weights):
        y = (F.silu(y) if i else y) @ w.mT
    return y + x if residual else y


def gradients(
    weights: Matrices, k: Tensor, v: Tensor, residual: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """For each layer its inputs a `(..., C, in)` and errors δ `(..., C, out)` on keys `(..., C,
    D)`: the gradient of `||M(k) - v||²` for a token is `δ aᵀ`."""
    inputs, products = [k], []
    for i, w in enumerate(weights):
        products.append(inputs[-1] @ w.mT)
        if i + 1 < len(weights):
            inputs.append(F.silu(products[-1]))
    error = 2 * (products[-1] - v + (k if residual else 0.0))
    errors = [error]
    for i in reversed(range(1, len(weights))):
        sigmoid = products[i - 1].sigmoid()
        error = (error @ weights[i]) * sigmoid * (1 + products[i - 1] * (1 - sigmoid))
        errors.insert(0, error)
    return inputs, errors


def limited_rates(
    rate: Tensor, inputs: list[Tensor], errors: list[Tensor], limit: float
) -> tuple[list[Tensor], Tensor]:
    """The learning rate `(..., C)` for each layer, smaller where `||δ aᵀ||` exceeds `limit`; and
    how often it does `(...)`."""
    rates, count = [], torch.zeros(rate.shape[:-1], dtype=torch.int64, device=rate.device)
    for a, error in zip(inputs, errors, strict=True):
        # Errors of a memory that runs away have squares that no float32 holds.
        largest = error.detach().abs().amax(-1, keepdim=True).clamp_min(1e-30)
        norm = largest[..., 0] * torch.linalg.vector_norm(error / largest, dim=-1)
        norm = norm * torch.linalg.vector_norm(a, dim=-1)
        rates.append(rate * (limit / norm.clamp_min(limit)))
        count += ((norm > limit) & (rate > 0)).sum(-1)
    return rates, count


class HandOn(torch.autograd.Function):
    """A matrix `(..., out, in)` as it is. Its gradient is scaled down, where `full` `(...)`, to a
    largest entry of `limit`: what a chunk hands to the one before."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, full: Tensor, limit: float) -> Tensor:
        ctx.save_for_backward(full)
        ctx.limit = limit
        return matrix.view_as(matrix)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, to_matrix: Tensor) -> tuple[Tensor, None, None]:
        (full,) = ctx.saved_tensors
        scales = ctx.limit / to_matrix.abs().amax((-2, -1)).clamp_min(ctx.limit)
        return to_matrix * torch.where(full, scales, 1.0)[..., None, None], None, None


def bounded(matrices: Matrices, limit: float) -> tuple[Matrices, Tensor]:
    """Matrices scaled down to a Frobenius norm of `limit` where theirs is larger; and for how many
    it is `(...)`."""
    norms = [torch.linalg.matrix_norm(m) for m in matrices]
    count = torch.stack([norm > limit for norm in norms]).sum(0)
    scaled = [
        m * (limit / norm.clamp_min(limit))[..., None, None]
        for m, norm in zip(matrices, norms, strict=True)
    ]
    return scaled, count
