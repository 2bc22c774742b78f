"""Rows of experts and sums of them by torch's own operators, every row moved once each way.

The two are the transposes of each other but for filling; the backward passes are written out
because the derivative of indexing adds up row by row.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def gather_rows(x: Tensor, order: Tensor, places: Tensor, drops: bool) -> Tensor:
    """Arguments and result as for the package's `gather_rows`."""
    return _Gather.apply(x, order, places, drops)


def combine_rows(
    y: Tensor, order: Tensor, places: Tensor, weights: Tensor | None, drops: bool
) -> Tensor:
    """Arguments and result as for the package's `combine_rows`."""
    return _Combine.apply(y, order, places, weights, drops)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, places: Tensor, drops: bool) -> Tensor:
        ctx.save_for_backward(places)
        ctx.drops = drops
        return _tokens_of_rows(x, order, places.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (places,) = ctx.saved_tensors
        return _sums(grad, places, None, ctx.drops), None, None, None


class _Combine(torch.autograd.Function):
    """Keeps y only where there are weights, whose gradient needs it."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, order: Tensor, places: Tensor, weights: Tensor | None, drops: bool
    ) -> Tensor:
        kept = (None, None) if weights is None else (y, weights)
        ctx.save_for_backward(order, places, *kept)
        return _sums(y, places, weights, drops)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        order, places, y, weights = ctx.saved_tensors
        rows = _tokens_of_rows(grad, order, places.shape[1])
        if weights is None:
            return rows, None, None, None, None
        shares = F.pad(weights.flatten(), (0, 1)).index_select(0, order)
        dots = (rows * y).sum(-1, dtype=torch.promote_types(y.dtype, torch.float32))
        flat = dots.new_zeros(weights.numel() + 1).index_copy_(0, order, dots)
        dweights = flat[:-1].view_as(weights).to(weights.dtype)
        return rows * shares[:, None].to(rows.dtype), None, None, dweights, None


def _tokens_of_rows(x: Tensor, order: Tensor, k: int) -> Tensor:
    return x.index_select(0, (order // k).clamp_(max=len(x) - 1))


def _sums(y: Tensor, places: Tensor, weights: Tensor | None, drops: bool) -> Tensor:
    if drops:
        y = F.pad(y, (0, 0, 0, 1))
    if weights is not None:
        weights = weights.to(y.dtype)
    return F.embedding_bag(places, y, mode="sum", per_sample_weights=weights)
