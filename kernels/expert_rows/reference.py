"""Rows of experts and sums of them, a row and a token at a time."""

from __future__ import annotations

import torch
from torch import Tensor


def gather_rows(x: Tensor, order: Tensor, places: Tensor, drops: bool) -> Tensor:
    """Arguments and result as for the package's `gather_rows`."""
    k = places.shape[1]
    rows = [x[min(choice // k, len(x) - 1)] for choice in order.tolist()]
    return torch.stack(rows) if rows else x[:0]


def combine_rows(
    y: Tensor, order: Tensor, places: Tensor, weights: Tensor | None, drops: bool
) -> Tensor:
    """Arguments and result as for the package's `combine_rows`."""
    tokens = []
    for token, rows in enumerate(places.tolist()):
        total = y.new_zeros(y.shape[1])
        for slot, row in enumerate(rows):
            if row < len(y):
                total = total + (y[row] if weights is None else weights[token, slot] * y[row])
        tokens.append(total)
    return torch.stack(tokens).to(y.dtype) if tokens else y[:0]
