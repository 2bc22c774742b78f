"""What goes through the chunks of a neural memory, and how one begins."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from rondo.kernels.neural_memory.chunk import Passes
from rondo.kernels.neural_memory.layers import Limits, Matrices


class Plan(NamedTuple):
    """What does not change with the numbers of tokens; n chunks, N = B H rows."""

    begins: Tensor
    """`(n, N)` bool as in `Grid`."""
    full: Tensor
    """`(n, N)` bool as in `Grid`."""
    mixed: list[bool]
    """As in `Grid`."""
    limits: Limits
    layers: int
    passes: Passes

    def groups(self) -> list[slice]:
        """About √n chunks each."""
        chunks = len(self.mixed)
        size = math.isqrt(chunks - 1) + 1
        return [slice(i, min(i + size, chunks)) for i in range(0, chunks, size)]

    def by_layer(self, tensors: tuple[Tensor, ...]) -> list[Matrices]:
        """`tensors` in lists of a tensor a layer."""
        return [list(tensors[i : i + self.layers]) for i in range(0, len(tensors), self.layers)]


class Sequences(NamedTuple):
    """What chunks take in, `(n, N, ...)`."""

    q: Tensor
    k: Tensor
    target: Tensor
    """As `learn` wants it."""
    rate: Tensor
    spread: Tensor
    reading: Tensor
    at_end: Tensor
    carried: Tensor
    """The last four as `chunked` makes them of the gates."""


class Kept(NamedTuple):
    """What the forward pass keeps of every chunk."""

    error: Tensor
    """δ of the last layer `(n, N, C, D)`."""
    factors: Tensor
    """What limits make of errors `(n, L, N, C)`."""
    scales: Tensor
    """What limits make of weights and momentum as a chunk begins `(n, L, N, 2)`."""


def begin(
    plan: Plan,
    i: int,
    start: Matrices,
    anchor: Matrices,
    states: list[Tensor],
    scales: Tensor | None,
) -> Matrices:
    """Makes of `states`, in place, what chunk i finds; returns the weights it learns at. `scales`:
    of `Kept`, for this chunk; None where all are 1."""
    widths = [s.shape[1] // 2 for s in states]
    if scales is not None:
        for state, scale in zip(states, scales, strict=True):
            plan.passes.scale(state, scale)
    if not plan.mixed[i]:
        return [s[:, :width] for s, width in zip(states, widths, strict=True)]
    begins = plan.begins[i][:, None, None]
    renewed = begins | plan.full[i][:, None, None]
    after = []
    for state, width, fresh, old in zip(states, widths, start, anchor, strict=True):
        weights, momentum = state[:, :width], state[:, width:]
        weights.copy_(torch.where(begins, fresh, weights))
        momentum.masked_fill_(begins, 0.0)
        after.append(torch.where(renewed, weights, old))
    return after
