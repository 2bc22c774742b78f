"""What the solver of one stretch of rows asks of those that hold the other stretches."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from rondo.kernels.summary import DiagonalSummary, MatrixSummary

Summary = DiagonalSummary | MatrixSummary


class Neighbours(Protocol):
    """Holders of the other stretches of the same rows; all call the same methods together.

    Summaries and states are as in `kernels.summary`: `(B, W)` for one variable, for N variables
    transitions `(B, W, N, N)` and states `(B, W, N, 1)`. Where a document begins with a stretch
    nothing may pass its border: it gets zeros.
    """

    count: int
    """Stretches."""

    def before(self, summary: Summary, first: Tensor) -> Tensor:
        """The state before this stretch, when `first` is the one before the first stretch."""
        ...

    def after(self, summary: Summary, last: Tensor) -> Tensor:
        """The gradient that comes to the end of this stretch, when `last` comes to that of the
        last one. Summaries take the gradient at a stretch's end to the one before its start."""
        ...

    def agree(self, figures: Tensor) -> Tensor:
        """The largest of each figure over all."""
        ...


def summary(transition: Tensor, state: Tensor) -> Summary:
    """Of a matrix `(N, N, B, 1, W)` and a vector `(N, B, 1, W)`."""
    if len(state) == 1:
        return DiagonalSummary(transition[0, 0, :, 0], state[0, :, 0])
    return MatrixSummary(transition[:, :, :, 0].permute(2, 3, 0, 1), vector(state))


def vector(state: Tensor) -> Tensor:
    """A state `(N, B, 1, W)` in the shape of a summary's."""
    return state[0, :, 0] if len(state) == 1 else state.permute(1, 3, 0, 2)


def state_of(x: Tensor) -> Tensor:
    """The inverse of `vector`."""
    return x[None, :, None] if x.dim() == 2 else x.permute(2, 0, 3, 1)
