"""What a stretch of a sequence does to a recurrent state, as an affine map that composes.

Every linear recurrence turns the state before a stretch into the state after it by
`S_out = transition · S_in + state`. Two stretches compose associatively, which is all that a
sequence-parallel scan needs to know about an operator.
"""

from __future__ import annotations

from typing import NamedTuple, TypeVar

from torch import Tensor


class DiagonalSummary(NamedTuple):
    """Elementwise transition, broadcastable to `state`."""

    transition: Tensor
    state: Tensor

    def apply(self, state: Tensor) -> Tensor:
        """The state after the stretch when it starts from `state`."""
        return self.transition * state + self.state


class MatrixSummary(NamedTuple):
    """Matrix transition `(..., K, K)` acting on the left of a state `(..., K, V)`."""

    transition: Tensor
    state: Tensor

    def apply(self, state: Tensor) -> Tensor:
        """The state after the stretch when it starts from `state`."""
        return self.transition @ state + self.state


S = TypeVar("S", DiagonalSummary, MatrixSummary)


def combine(first: S, second: S) -> S:
    """The summary of `first` followed by `second`. Associative, not commutative."""
    if isinstance(second, MatrixSummary):
        transition = second.transition @ first.transition
    else:
        transition = second.transition * first.transition
    return type(second)(transition, second.apply(first.state))
