"""Decay of its own for every key channel; same interface as `HeadGates`.

The decay of a pair is then inside the dot product, `sum_k q_ik k_jk exp(G_ik - G_jk)`, and has to
be split between the two factors. Every split point between j and i keeps both exponents at or
below zero, so the chunk is halved again and again: in a block of 2s tokens the second half reads
the first through the point between them. Each level is one batch of small products, no pair is
ever treated alone, and sums only run over gates that lie between reader and writer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rondo.kernels.delta_rule.gates import FLOOR, LOG2E, scaled, wide
from rondo.kernels.delta_rule.layout import Documents


class Level(NamedTuple):
    """Factors of the blocks of `2 * half` tokens, `(Y, M, half, K)`."""

    half: int
    rows: Tensor  # of the tokens of the second half: decay since the middle
    columns: Tensor  # of the tokens of the first half: decay up to the middle


class KeyGates:
    """`from_start` and `to_end` are `(Y, C, K)`, `through` is `(Y, K, 1)`, and `pairs` only
    keeps documents apart."""

    def __init__(
        self, log_decay: Tensor, docs: Documents | None, pairs: Tensor | None, dtype: torch.dtype
    ) -> None:
        """Arguments as for `HeadGates`; `log_decay` is `(Y, C, K)`, `pairs` from
        `document_pairs`."""
        kind = wide(dtype)
        self.pairs = pairs
        before = (log_decay.to(kind) * LOG2E).clamp_(min=FLOOR)
        after = torch.zeros_like(before)
        size = log_decay.shape[-2]
        self.levels: list[Level] = []
        half = 1
        while half < size:
            inclusive, exclusive = _halves(before, half), _halves(after, half)
            rows, columns = inclusive[:, :, 1], exclusive[:, :, 0]
            self.levels.append(Level(half, rows.exp2().to(dtype), columns.exp2().to(dtype)))
            columns += rows[:, :, -1:]
            rows += inclusive[:, :, 0, -1:]
            half *= 2
        before, after = before.exp2_(), after.exp2_()
        self.from_start = scaled(before.to(dtype), None if docs is None else docs.incoming)
        self.to_end = scaled(after.to(dtype), None if docs is None else docs.outgoing)
        self.through = scaled(before[..., -1:, :].mT, None if docs is None else docs.through)

    def products(self, readers: Sequence[Tensor], writers: Tensor) -> list[Tensor]:
        """See `HeadGates.products`."""
        size = writers.shape[1]
        results = []
        for r in readers:
            out = r.new_zeros(r.shape[0], size, size)
            torch.diagonal(out, dim1=1, dim2=2).copy_((r * writers).sum(-1))
            for level in self.levels:
                rows, columns = _rows(r, level), _columns(writers, level)
                corner = _corners(out, level.half)
                corner.copy_(torch.bmm(rows, columns.mT).view(corner.shape))
            results.append(out)
        return results if self.pairs is None else [x.mul_(self.pairs) for x in results]

    def reduce(self, first: Tensor, second: Tensor) -> Tensor:
        """See `HeadGates.reduce`."""
        return (first * second).to(wide(first.dtype))

    def backward(
        self,
        grads: Sequence[Tensor],
        products: Sequence[Tensor],
        readers: Sequence[Tensor],
        writers: Tensor,
        sums: Sequence[Tensor],
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        """See `HeadGates.backward`; goes back through the levels, largest blocks first."""
        if self.pairs is not None:
            grads = [g.mul_(self.pairs) for g in grads]
        before, after, through = sums
        before[:, -1:] += through
        diagonals = [g.diagonal(dim1=1, dim2=2).unsqueeze(-1) for g in grads]
        d_readers = [d * writers for d in diagonals]
        d_writers = diagonals[0] * readers[0]
        for d, r in zip(diagonals[1:], readers[1:], strict=True):
            d_writers.addcmul_(d, r)
        for level in reversed(self.levels):
            inclusive, exclusive = _halves(before, level.half), _halves(after, level.half)
            inclusive[:, :, 0, -1:] += inclusive[:, :, 1].sum(2, keepdim=True)
            inclusive[:, :, 1, -1:] += exclusive[:, :, 0].sum(2, keepdim=True)
            columns = _columns(writers, level)
            d_columns = torch.zeros_like(columns)
            for g, r, d_r in zip(grads, readers, d_readers, strict=True):
                rows = _rows(r, level)
                corner = _corners(g, level.half).reshape(-1, level.half, level.half)
                d_rows = torch.bmm(corner, columns)
                d_columns.baddbmm_(corner.mT, rows)
                inclusive[:, :, 1] += (d_rows * rows).view_as(level.rows)
                _halves(d_r, level.half)[:, :, 1] += d_rows.view_as(level.rows) * level.rows
            exclusive[:, :, 0] += (d_columns * columns).view_as(level.columns)
            d_columns = d_columns.view_as(level.columns) * level.columns
            _halves(d_writers, level.half)[:, :, 0] += d_columns
        return d_readers, d_writers, before


def _halves(x: Tensor, half: int) -> Tensor:
    """View of `(Y, C, D)` as `(Y, M, 2, half, D)`."""
    return x.unflatten(1, (-1, 2, half))


def _rows(readers: Tensor, level: Level) -> Tensor:
    return (_halves(readers, level.half)[:, :, 1] * level.rows).flatten(0, 1)


def _columns(writers: Tensor, level: Level) -> Tensor:
    return (_halves(writers, level.half)[:, :, 0] * level.columns).flatten(0, 1)


def _corners(x: Tensor, half: int) -> Tensor:
    """View `(Y, M, half, half)` of the lower left quarters of the diagonal blocks of 2 * half."""
    count = x.shape[-1] // (2 * half)
    tiles = x.unflatten(2, (count, 2 * half)).unflatten(1, (count, 2 * half))
    return tiles.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)[..., half:, :half]
