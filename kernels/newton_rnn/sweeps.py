"""One pass over rows in which all chunks step together.

Chunks are `size` positions long, the last one as long as what is left. Step i takes position i of
every chunk, `x[:, i::size]`: one slice, whatever the length.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rondo.kernels.newton_rnn import blocks
from rondo.kernels.newton_rnn.cells import Block, Cell, State

_FLUSH_EVERY = 4


class Rows(NamedTuple):
    """A recurrence over rows `(B, T)` of W channels, and its chunks."""

    cell: Cell
    gates: Tensor
    """`(B, T, G, W)`."""
    weights: Tensor
    """`(R, W)`, of the dtype that is computed in."""
    bias: Tensor | None
    """`(G, W)`, likewise."""
    starts: Tensor | None
    """`(B, T, 1)` bool: where a new document begins."""
    size: int
    """Positions of a chunk."""

    def at(self, step: int) -> slice:
        """Where the chunks' positions of a step are."""
        return slice(step, None, self.size)

    def ends(self) -> slice:
        """Where chunks end, but for the last one."""
        return slice(self.size - 1, -1, self.size)

    def inputs(self, places: slice) -> Sequence[Tensor]:
        """The gates at some places, `(B, places, W)` each."""
        x = self.gates[:, places]
        if self.bias is not None:
            x = x + self.bias
        return x.to(self.weights.dtype).unbind(2)

    def within(self, places: slice, x: State) -> State:
        """`x` `(B, places, W)`, zero where a document begins."""
        if self.starts is None:
            return x
        new = self.starts[:, places]
        return [y.masked_fill(new, 0.0) for y in x]


class Sweep(NamedTuple):
    """What a forward pass finds."""

    states: State
    """`(B, T, W)`, at every position."""
    ends: State
    """`(B, chunks, W)`, those at the chunks' ends."""
    products: Block | None
    """The derivatives of the ends by the states that chunks began with."""


def forward(rows: Rows, borders: State, with_products: bool) -> Sweep:
    """Runs every chunk from its state in `borders` `(B, chunks, W)`."""
    time, weights = rows.gates.shape[1], rows.weights.unbind(0)
    found = [x.new_empty(len(x), time, x.shape[2]) for x in borders]
    state, product, short = borders, None, None
    for step in range(min(rows.size, time)):
        gates = rows.inputs(rows.at(step))
        chunks = gates[0].shape[1]
        if chunks < state[0].shape[1]:  # the last chunk has ended
            state = [x[:, :chunks] for x in state]
            if product is not None:
                product, short = (
                    blocks.at(product, places) for places in (slice(chunks), slice(chunks, None))
                )
        state = rows.within(rows.at(step), state)
        if with_products:
            state, jacobian, _ = rows.cell.linearize(state, gates, weights)
            jacobian = [rows.within(rows.at(step), row) for row in jacobian]
            product = jacobian if product is None else blocks.product(jacobian, product)
            if step % _FLUSH_EVERY == 0:
                product = blocks.flushed(product)
        else:
            state = rows.cell.step(state, gates, weights)
        for whole, x in zip(found, state, strict=True):
            whole[:, rows.at(step)] = x
    if product is not None and short is not None:
        product = blocks.joined(product, short)
    ends = [torch.cat((x[:, rows.ends()], x[:, -1:]), 1) for x in found]
    return Sweep(found, ends, product)
