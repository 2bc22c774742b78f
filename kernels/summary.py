"""What a stretch of a sequence does to a recurrent state, as an affine map that composes.

Every linear recurrence turns the state before a stretch into the state after it by
`S_out = transition · S_in + state`. Two stretches compose associatively, which is all that a
sequence-parallel scan needs to know about an operator.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
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


class LogSummary(NamedTuple):
    """A transition `(..., 1)` by its logarithm, and a state whose last number m, a constant, says
    that the others are to be multiplied by exp(m): nothing overflows."""

    transition: Tensor
    state: Tensor

    def apply(self, state: Tensor) -> Tensor:
        """The state after the stretch when it starts from `state`."""
        before, own = state[..., -1:].detach(), self.state[..., -1:].detach()
        m = torch.maximum(self.transition.detach() + before, own)
        kept = torch.exp(self.transition + before - m) * state[..., :-1]
        return torch.cat((kept + torch.exp(own - m) * self.state[..., :-1], m), -1)


class Stretch(NamedTuple):
    """An operator on a stretch of tokens, begun before the state that enters it is known."""

    summary: DiagonalSummary | MatrixSummary | LogSummary
    """What it does to any state. Apply it to the state that `finish` is given, and to no other:
    its transition may leave its part of the gradient to `finish`."""
    finish: Callable[[Tensor], tuple[Tensor, Tensor]]
    """The state before the stretch -> outputs, and the state after it. Call it once."""


S = TypeVar("S", DiagonalSummary, MatrixSummary, LogSummary)


def combine(first: S, second: S) -> S:
    """The summary of `first` followed by `second`. Associative, not commutative."""
    if isinstance(second, MatrixSummary):
        transition = second.transition @ first.transition
    elif isinstance(second, LogSummary):
        transition = second.transition + first.transition
    else:
        transition = second.transition * first.transition
    return type(second)(transition, second.apply(first.state))
