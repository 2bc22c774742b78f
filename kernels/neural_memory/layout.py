"""A grid of chunks in which every document begins with a chunk of its own."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rondo.kernels.segments import document_positions, document_starts, first_document
from rondo.kernels.tiles import has_numbers


class Grid(NamedTuple):
    """Where the tokens of rows `(B, T)` are among n chunks of C slots."""

    slots: Tensor | None
    """`(B, T)`: place of each token in `(B, n C)`; None: the first T."""
    chunks: int
    size: int
    begins: Tensor
    """`(B, n)` bool: a document begins here that is not the initial state's."""
    full: Tensor
    """`(B, n)` bool: the chunk before is complete, and this goes on with its document."""
    mixed: list[bool]
    """For each chunk, False where `full` is known to hold for all rows."""
    done: Tensor
    """`(B,)`: tokens of the last chunk after the row."""

    def lay(self, x: Tensor) -> Tensor:
        """`(B, n, C, ...)` of `x` `(B, T, ...)`, with zeros where no token is."""
        total = self.chunks * self.size
        if self.slots is None:
            padding = (0, 0) * (x.dim() - 2) + (0, total - x.shape[1])
            return F.pad(x, padding).unflatten(1, (self.chunks, self.size))
        index = self.slots.view(*self.slots.shape, *(1,) * (x.dim() - 2)).expand_as(x)
        laid = x.new_zeros(x.shape[0], total, *x.shape[2:]).scatter(1, index, x)
        return laid.unflatten(1, (self.chunks, self.size))

    def pick(self, x: Tensor, time: int) -> Tensor:
        """The tokens `(B, T, ...)` of `x` `(B, n, C, ...)`."""
        flat = x.flatten(1, 2)
        if self.slots is None:
            return flat[:, :time]
        index = self.slots.view(*self.slots.shape, *(1,) * (flat.dim() - 2))
        return flat.gather(1, index.expand(-1, -1, *flat.shape[2:]))


def grid(
    x: Tensor,
    done: Tensor | None,
    segment_ids: Tensor | None,
    chunk_size: int,
    at_border: bool = False,
) -> Grid:
    """The grid of rows `x` `(B, T, ...)` whose state has `done` `(B,)` tokens in its open chunk;
    None: it has seen nothing. `at_border`: no chunk is open and not complete."""
    batch, time = x.shape[:2]
    if done is None:
        done = torch.zeros(batch, dtype=torch.int64, device=x.device)
        at_border = True
    if time == 1 or (at_border and segment_ids is None):
        return _plain(time, done, chunk_size)
    count = (time + chunk_size - 2) // chunk_size + 1  # of one document, whatever its state
    documents = segment_ids is not None and has_numbers()
    if segment_ids is None:
        segment_ids = torch.zeros(batch, time, dtype=torch.int64, device=x.device)
    starts = document_starts(segment_ids)
    place = document_positions(segment_ids)
    place = (place + torch.where(first_document(segment_ids), done[:, None], 0)) % chunk_size
    new = place == 0
    new[:, 0] = True
    chunk = new.cumsum(1) - 1
    goes_on = new & ~starts
    goes_on[:, 0] = done == chunk_size
    if documents:
        count = int(chunk.max()) + 1
    none = chunk.new_zeros(batch, count)
    begins, full = (none.scatter_add(1, chunk, flag.long()) > 0 for flag in (starts, goes_on))
    mixed = (~full).any(0).tolist() if documents else [True] * count
    slots = chunk * chunk_size + place
    return Grid(slots, count, chunk_size, begins, full, mixed, place[:, -1] + 1)


def _plain(time: int, done: Tensor, chunk_size: int) -> Grid:
    """Of one token, or of rows that begin at their memory's start: nothing depends on numbers."""
    count = -(-time // chunk_size)
    full = torch.ones(len(done), count, dtype=torch.bool, device=done.device)
    full[:, 0] = done == chunk_size
    after = (done + time - 1) % chunk_size + 1
    mixed = [i == 0 for i in range(count)]
    return Grid(None, count, min(chunk_size, time), torch.zeros_like(full), full, mixed, after)
