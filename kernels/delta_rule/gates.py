"""Decay inside a chunk: how strongly a token sees earlier tokens and the states around it.

Readers are the tokens looking back (queries, erase keys), writers the tokens being read. With
`G_i` the sum of log decay up to token i, three factors are needed, never one above 1:
`exp(G_i - G_j)` between a reader i and a writer j <= i, `exp(G_i)` from the state before the chunk,
`exp(G_C - G_j)` to the state after it. All of it is done in base 2, where exp is cheaper.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rondo.kernels.delta_rule.layout import Documents

LOG2E = 1 / math.log(2)
FLOOR = -16384.0  # decay per token, in powers of two: zero in every dtype, and sums stay exact
GRID = 2.0**32


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of gates, states and sums for operands of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def pair_factors(
    log_decay: Tensor | None, same: Tensor | None, dtype: torch.dtype
) -> Tensor | None:
    """`exp(G_i - G_j)` between reader i and writer j of a chunk, `(Y, C, C)`.

    Args:
        log_decay: `(Y, C, 1)`, or None for no decay.
        same: `(Y, C, C)` mask of `document_pairs`, or None for one document.
        dtype: of the result.

    Returns:
        Zero above the diagonal and across documents; None when it would be one everywhere else.
    """
    if log_decay is None:
        return same
    total = _exact_sums(log_decay, dtype)
    # Above the diagonal it is infinite until it is written over.
    pairs = (total - total.mT).to(wide(dtype)).exp2_().tril_().to(dtype)
    return pairs if same is None else pairs.mul_(same)


class HeadGates:
    """One decay per head and token, or none.

    Attributes, None where there is nothing to multiply with:
        pairs: `(Y, C, C)`, see `pair_factors`.
        from_start, to_end: `(Y, C, 1)`.
        through: `(Y, 1, 1)`, from state to state, float32 or float64.
    """

    from_start: Tensor | None = None
    to_end: Tensor | None = None
    through: Tensor | None = None

    def __init__(
        self,
        log_decay: Tensor | None,
        docs: Documents | None,
        pairs: Tensor | None,
        dtype: torch.dtype,
    ) -> None:
        """
        Args:
            log_decay: `(Y, C, 1)` or None.
            docs: masks of packed documents, or None.
            pairs: from `pair_factors`.
            dtype: of the matrix products; factors are rounded to it.
        """
        self.gated, self.pairs = log_decay is not None, pairs
        kind = wide(dtype)
        if docs is not None:
            self.from_start, self.to_end = docs.incoming, docs.outgoing
            self.through = docs.through.to(kind)
        if log_decay is not None:
            total = _exact_sums(log_decay, dtype)
            last = total[..., -1:, :]
            self.from_start = scaled(total.to(kind).exp2().to(dtype), self.from_start)
            self.to_end = scaled((last - total).to(kind).exp2().to(dtype), self.to_end)
            self.through = scaled(last.to(kind).exp2(), self.through)

    def products(self, readers: Sequence[Tensor], writers: Tensor) -> list[Tensor]:
        """Decayed dot products `(Y, C, C)` of each of `readers` with `writers`, for j <= i."""
        return [self._mask(torch.bmm(r, writers.mT)) for r in readers]

    def _mask(self, x: Tensor) -> Tensor:
        return x.tril_() if self.pairs is None else x.mul_(self.pairs)

    def reduce(self, first: Tensor, second: Tensor) -> Tensor:
        """Elementwise product of `(Y, C, K)` tensors, summed to the shape of the gate, wide."""
        return dot(first, second)

    def backward(
        self,
        grads: Sequence[Tensor],
        products: Sequence[Tensor],
        readers: Sequence[Tensor],
        writers: Tensor,
        sums: Sequence[Tensor],
    ) -> tuple[list[Tensor], Tensor, Tensor | None]:
        """Gradients of `products`.

        Args:
            grads: of the products; overwritten.
            products, readers, writers: what the forward pass returned and got.
            sums: gradients with respect to `G_i`, `G_C - G_j` (shaped as the gate) and `G_C`
                (`(Y, 1, K)`) from everywhere else; not used when there is no gate.

        Returns:
            Gradients of the readers, of the writers, and of `log_decay`.
        """
        log_decay = None
        if self.gated:
            log_decay = self._gate_gradient(grads, products, *sums)
        grads = [self._mask(g) for g in grads]
        d_writers = torch.bmm(grads[0].mT, readers[0])
        for g, r in zip(grads[1:], readers[1:], strict=True):
            d_writers.baddbmm_(g.mT, r)
        return [torch.bmm(g, writers) for g in grads], d_writers, log_decay

    def _gate_gradient(
        self,
        grads: Sequence[Tensor],
        products: Sequence[Tensor],
        start: Tensor,
        end: Tensor,
        through: Tensor,
    ) -> Tensor:
        # A pair i > j counts for every gate in between: in the sum over rows from t on it is
        # added once as a row and, for j >= t, taken away once as a column.
        both = grads[0] * products[0]
        for g, p in zip(grads[1:], products[1:], strict=True):
            both.addcmul_(g, p)
        both = both.to(start.dtype)
        start = start + both.sum(-1, keepdim=True) - both.sum(-2).unsqueeze(-1)
        return _suffix_sum(start) + (end.cumsum(-2) - end) + through.sum(-1, keepdim=True)


def _exact_sums(log_decay: Tensor, dtype: torch.dtype) -> Tensor:
    """Sums of log decay from the start of the chunk, in powers of two, float64.

    Differences of sums lose digits behind a strong decay. These do not: multiples of 2^-32 of up
    to 2^20 are exact, so a document cannot be felt in the rounding of the next one either.
    """
    steps = (log_decay.double() * LOG2E).clamp(min=FLOOR)
    if dtype != torch.float64:
        steps = steps.mul_(GRID).round_().mul_(1 / GRID)
    return steps.cumsum(-2)


def _suffix_sum(x: Tensor) -> Tensor:
    return x.flip(-2).cumsum(-2).flip(-2)


def scaled(x: Tensor, factor: Tensor | None) -> Tensor:
    """`x * factor`, where None is one."""
    return x if factor is None else x * factor


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Dot products of the rows, `(.., 1)`, wide."""
    # sum accumulates bfloat16 in float32; asking it for float32 would copy its input first.
    return (a * b).sum(-1, keepdim=True).to(wide(a.dtype))
