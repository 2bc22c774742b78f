"""The gradient of a solution: one linear solve backwards, with the Jacobians of the solution.

The gradient λ_t of the state at t, of all that it leads to, is `g_t + J_{t+1}ᵀ λ_{t+1}` with g_t
what the output at t gets; everything else is local. Rows are taken from their end in tiles whose
Jacobians stay in the cache, each solved like a `linear_scan`.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from rondo.kernels.newton_rnn import blocks
from rondo.kernels.newton_rnn.cells import Linear, State
from rondo.kernels.newton_rnn.neighbours import Neighbours, state_of, summary, vector
from rondo.kernels.newton_rnn.sweeps import Rows
from rondo.kernels.tiles import tiles

LEAST = 16
"""Positions of a tile, at least."""
TILE = 2**17
"""Elements of a tile on a CPU; a GPU takes all at once."""


class Solution(NamedTuple):
    """States at every position, and what the loss says of them."""

    rows: Rows
    states: State
    """`(B, T, W)`."""
    first: State
    """`(B, 1, W)`, before position 0."""
    at_output: Tensor | None
    """`(B, T, W)`: the gradient of the last variable."""

    def linear(self, part: slice) -> Linear:
        """The steps of consecutive positions; none crosses into a document."""
        rows, start = self.rows, part.start
        if start > 0:
            before = [x[:, start - 1 : part.stop - 1] for x in self.states]
        else:
            pairs = zip(self.first, self.states, strict=True)
            before = [torch.cat((x, y[:, : part.stop - 1]), 1) for x, y in pairs]
        before = rows.within(part, before)
        found = rows.cell.linearize(before, rows.inputs(part), rows.weights.unbind(0))
        return found._replace(jacobian=[rows.within(part, row) for row in found.jacobian])

    def given(self, part: slice) -> State:
        """g, `(B, t, W)`."""
        zero = [torch.zeros_like(x[:, part]) for x in self.states]
        if self.at_output is None:
            return zero
        return [*zero[:-1], self.at_output[:, part].to(zero[0].dtype)]


class Gradients(NamedTuple):
    """In the shapes of `Rows`; `first` is `(B, 1, W)`."""

    gates: Tensor
    weights: Tensor
    bias: Tensor | None
    first: State


def gradients(solution: Solution, last: State, neighbours: Neighbours | None = None) -> Gradients:
    """Gradients of everything; `last` `(B, 1, W)` is that of the state after the row."""
    rows = solution.rows
    parts = _parts(solution)
    if neighbours is not None:
        last = _from_neighbours(solution, parts, last, neighbours)
    at_gates = torch.empty_like(rows.gates)
    longest = [torch.zeros_like(x) for x in solution.given(parts[0])[:1]]
    totals = [torch.zeros_like(*longest) for _ in rows.weights]
    biases = [torch.zeros_like(*longest) for _ in range(rows.gates.shape[2])]
    for part in reversed(parts):
        _, jacobian, tape = solution.linear(part)
        jacobian = blocks.transposed(jacobian)
        at = blocks.scan(jacobian, solution.given(part), last, reverse=True)
        last = blocks.apply(blocks.at(jacobian, slice(1)), [x[:, :1] for x in at])
        here = slice(at[0].shape[1])
        found = rows.cell.pull(tape, at, [x[:, here] for x in totals])
        for i, grad in enumerate(found):
            at_gates[:, part, i] = grad
            if rows.bias is not None:
                biases[i][:, here] += grad
    weights, bias = (torch.stack([x.sum((0, 1)) for x in each]) for each in (totals, biases))
    return Gradients(at_gates, weights, None if rows.bias is None else bias, last)


def _parts(solution: Solution) -> list[slice]:
    """Tiles of the time; a short one comes last."""
    batch, time, _, width = solution.rows.gates.shape
    if solution.rows.gates.device.type != "cpu":
        return [slice(0, time)]
    return [tile.times for tile in tiles((1, time, batch * width), TILE, LEAST)]


def _from_neighbours(
    solution: Solution, parts: list[slice], last: State, neighbours: Neighbours
) -> State:
    """The gradient that comes to the end of this stretch, when `last` comes to the last one's."""
    out, through = [torch.zeros_like(x) for x in last], []
    for part in reversed(parts):
        jacobian = blocks.transposed(solution.linear(part).jacobian)
        at = blocks.scan(jacobian, solution.given(part), out, reverse=True)
        out = blocks.apply(blocks.at(jacobian, slice(1)), [x[:, :1] for x in at])
        through.append(blocks.across(jacobian, reverse=True))
    whole = functools.reduce(lambda late, early: blocks.product(early, late), through)
    return state_of(neighbours.after(summary(whole, out), vector(last)))
