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
from rondo.kernels.newton_rnn.cells import Linear
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
    states: Tensor
    """`(N, B, T, W)`."""
    before: Tensor
    """`(N, B, 1, W)`, before position 0."""
    at_output: Tensor | None
    """`(B, T, W)`: the gradient of the last variable."""

    def linear(self, part: slice) -> Linear:
        """The steps of consecutive positions; none crosses into a document."""
        rows, start = self.rows, part.start
        if start > 0:
            before = self.states[:, :, start - 1 : part.stop - 1]
        else:
            before = torch.cat((self.before, self.states[:, :, : part.stop - 1]), 2)
        before = rows.within(part, before)
        found = rows.cell.linearize(before, rows.inputs(part), rows.weights.unbind(0))
        # A gradient goes back by the transposed matrix.
        return found._replace(jacobian=rows.within(part, found.jacobian).transpose(0, 1))

    def given(self, part: slice) -> Tensor:
        """g, `(N, B, t, W)`."""
        if self.at_output is not None and len(self.states) == 1:
            return self.at_output[:, part].unsqueeze(0)
        found = torch.zeros_like(self.states[:, :, part])
        if self.at_output is not None:
            found[-1] = self.at_output[:, part]
        return found


class Gradients(NamedTuple):
    """In the shapes of `Rows`; `before` is `(N, B, 1, W)`."""

    gates: Tensor
    weights: Tensor
    bias: Tensor | None
    before: Tensor


def gradients(solution: Solution, last: Tensor, neighbours: Neighbours | None = None) -> Gradients:
    """Gradients of everything; `last` `(N, B, 1, W)` is that of the state after the row."""
    rows = solution.rows
    parts = _parts(rows.gates)
    if neighbours is not None:
        last = _from_neighbours(solution, parts, last, neighbours)
    at_gates = torch.empty_like(rows.gates)
    longest = solution.states[0][:, parts[0]].shape
    totals = rows.weights.new_zeros(len(rows.weights), *longest)
    biases = None if rows.bias is None else rows.weights.new_zeros(len(rows.bias), *longest)
    for part in reversed(parts):
        _, jacobian, tape = solution.linear(part)
        at = blocks.scan(jacobian, solution.given(part), last, reverse=True)
        last = blocks.apply(jacobian[:, :, :, :1], at[:, :, :1])
        here, out = slice(at.shape[2]), at_gates[:, part].unbind(2)
        if at_gates.dtype != at.dtype:
            out = at.new_empty(len(out), *at.shape[1:]).unbind(0)
        rows.cell.pull(tape, at, totals[:, :, here].unbind(0), out)
        if at_gates.dtype != at.dtype:
            at_gates[:, part] = torch.stack(out, 2)
        if biases is not None:
            for total, grad in zip(biases, out, strict=True):
                total[:, here] += grad
    bias = None if biases is None else biases.sum((1, 2))
    return Gradients(at_gates, totals.sum((1, 2)), bias, last)


def _parts(gates: Tensor) -> list[slice]:
    """Tiles of the time; a short one comes last."""
    batch, time, _, width = gates.shape
    if gates.device.type != "cpu":
        return [slice(0, time)]
    return [tile.times for tile in tiles((1, time, batch * width), TILE, LEAST)]


def _from_neighbours(
    solution: Solution, parts: list[slice], last: Tensor, neighbours: Neighbours
) -> Tensor:
    """The gradient that comes to the end of this stretch, when `last` comes to the last one's."""
    out, through = torch.zeros_like(last), []
    for part in reversed(parts):
        jacobian = solution.linear(part).jacobian
        at = blocks.scan(jacobian, solution.given(part), out, reverse=True)
        out = blocks.apply(jacobian[:, :, :, :1], at[:, :, :1])
        through.append(blocks.across(jacobian, reverse=True))
    whole = functools.reduce(lambda late, early: blocks.product(early, late), through)
    return state_of(neighbours.after(summary(whole, out), vector(last)))
