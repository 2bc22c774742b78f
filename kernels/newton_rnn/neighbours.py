"""What the solver of one stretch of rows asks of those that hold the other stretches."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from rondo.kernels.newton_rnn.cells import Block, State
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


def summary(transition: Block, state: State) -> Summary:
    """Of entries `(B, 1, W)`."""
    if len(state) == 1:
        return DiagonalSummary(transition[0][0][:, 0], state[0][:, 0])
    rows = [torch.stack([x[:, 0] for x in row], -1) for row in transition]
    return MatrixSummary(torch.stack(rows, -2), vector(state))


def vector(state: State) -> Tensor:
    """A state of entries `(B, 1, W)` in one tensor."""
    if len(state) == 1:
        return state[0][:, 0]
    return torch.stack([x[:, 0] for x in state], -1).unsqueeze(-1)


def state_of(x: Tensor) -> State:
    """The inverse of `vector`."""
    if x.dim() == 2:
        return [x.unsqueeze(1)]
    return [y.unsqueeze(1) for y in x[..., 0].unbind(-1)]
