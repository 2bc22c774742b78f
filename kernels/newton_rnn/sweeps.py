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
from rondo.kernels.newton_rnn.cells import Cell

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
        """The gates at some places, `(B, P, W)` each."""
        x = self.gates[:, places]
        if self.bias is not None:
            x = x + self.bias
        return x.to(self.weights.dtype).unbind(2)

    def within(self, places: slice, x: Tensor) -> Tensor:
        """`x` `(..., B, P, W)`, zero where a document begins."""
        return x if self.starts is None else x.masked_fill(self.starts[:, places], 0.0)


class Sweep(NamedTuple):
    """What a pass finds."""

    states: Tensor
    """`(N, B, T, W)`, at every position."""
    ends: Tensor
    """`(N, B, chunks, W)`, those at the chunks' ends."""
    products: Tensor | None
    """`(N, N, B, chunks, W)`: the derivatives of the ends by the states that chunks began with."""


def forward(rows: Rows, borders: Tensor, with_products: bool) -> Sweep:
    """Runs every chunk from its state in `borders` `(N, B, chunks, W)`."""
    time, weights = rows.gates.shape[1], rows.weights.unbind(0)
    found = borders.new_empty(*borders.shape[:2], time, borders.shape[3])
    state, product, short = borders, None, None
    for step in range(min(rows.size, time)):
        places = rows.at(step)
        gates = rows.inputs(places)
        chunks = gates[0].shape[1]
        if chunks < state.shape[2]:  # the last chunk has ended
            state = state[:, :, :chunks]
            if product is not None:
                product, short = product[:, :, :, :chunks], product[:, :, :, chunks:]
        state = rows.within(places, state)
        if with_products:
            state, jacobian, _ = rows.cell.linearize(state, gates, weights)
            jacobian = rows.within(places, jacobian)
            product = jacobian if product is None else blocks.product(jacobian, product)
            if step % _FLUSH_EVERY == 0:
                product = blocks.flushed(product)
        else:
            state = rows.cell.step(state, gates, weights)
        found[:, :, places] = state
    if product is not None and short is not None:
        product = torch.cat((product, short), 3)
    ends = torch.cat((found[:, :, rows.ends()], found[:, :, -1:]), 2)
    return Sweep(found, ends, product)
