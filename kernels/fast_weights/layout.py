"""Which tokens of packed rows make up a chunk, and which weights each of them reads.

Chunks count from the start of a document, so they lie differently in every row. They are put into
slots, the same number in every row, that the operator visits in turn: all but the last hold chunks
that end in the row, the last one the chunk that is still open after it.

When tokens read weights from before their own chunk, a chunk matters only if it becomes full or is
open at the end of the row. At most one chunk of a row becomes full within any `chunk` positions, so
it takes the slot of the window of positions it ends in, and the slots are as many as the windows
however many documents there are. When tokens read weights that their own chunk has updated, every
piece of a document takes a slot.

Letters in shapes: B rows, T positions, S slots, W = min(chunk, T) positions in a slot.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rondo.kernels.segments import (
    document_positions,
    document_starts,
    first_document,
    last_document,
)
from rondo.kernels.tiles import has_numbers


class Slots(NamedTuple):
    """Positions of a row arranged in slots."""

    index: Tensor  # (S, B, W) int64: position in the row, 0 where there is none
    filled: Tensor  # (S, B, W) bool: there is one
    busy: list[bool]  # S: some row has a position there

    def take(self, x: Tensor) -> Tensor:
        """`(B, T, H, D)` to `(S, B, H, W, D)`, zero where there is no position."""
        rows = torch.arange(x.shape[0], device=x.device)[:, None]
        slots = x.flatten(0, 1).index_select(0, (self.index + rows * x.shape[1]).flatten())
        # Whatever else stood there would be multiplied by zeros, which a NaN survives.
        slots = slots.masked_fill_(~self.filled.flatten()[:, None, None], 0.0)
        return slots.unflatten(0, self.index.shape).transpose(2, 3).contiguous()

    def share(self, rank: int, size: int) -> Slots:
        """Of the same slots the positions `rank`, `rank + size`, ..., which become 0, 1, ..."""
        width = self.index.shape[2]
        every = torch.arange(0, width, size, device=self.index.device)
        place = every + (rank - self.index[..., :1]) % size  # a slot holds positions in a row
        last = width - 1
        index, filled = (x.gather(2, place.clamp_max(last)) for x in (self.index, self.filled))
        return Slots(index // size, filled & (place <= last), self.busy)


class Layout(NamedTuple):
    """Chunks in slots."""

    write: Slots  # tokens by the chunk they belong to
    read: Slots  # tokens by the weights they read: of slot n of `write`, or those before it
    source: Tensor  # (B, T) int64: where each position is among the S * W of `read`
    count: Tensor  # (S, B) int64: tokens of the chunk, those before the row included
    full: Tensor | None  # (S, B) bool: it has all its tokens; None: all but the last slot's
    fresh: Tensor | None  # (S, B) bool: it starts a document other than that of the state
    carried: Tensor | None  # (S, B) bool: it continues the open chunk of the state
    unread: Tensor | None  # (B, T) bool: positions that read the initial weights, in no slot

    def learns(self) -> bool:
        """Whether some token reads weights that were updated in the row."""
        if self.read is self.write:
            return True
        return any(self.write.busy[:-1]) and any(self.read.busy[self.write.busy.index(True) + 1 :])

    def share(self, rank: int, size: int) -> Layout:
        """The same chunks, with only the positions `rank`, `rank + size`, ... of every row."""
        own, width = slice(rank, None, size), self.read.index.shape[2]
        slot, place = self.source[:, own] // width, self.source[:, own] % width
        return self._replace(
            write=self.write.share(rank, size),
            read=self.read.share(rank, size),
            source=slot * -(-width // size) + place // size,
            unread=None if self.unread is None else self.unread[:, own],
        )


class _Positions(NamedTuple):
    """Each position and its chunk, all `(B, T)`."""

    index: Tensor  # position in the row
    begin: Tensor  # position that the chunk starts at; negative if before the row
    first: Tensor  # bool: the chunk starts its document, or continues the open chunk
    ours: Tensor  # bool: of the document of the state


def _locate(ids: Tensor, count: Tensor | None, chunk: int) -> _Positions:
    index = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    ours = first_document(ids)
    position = document_positions(ids)
    if count is not None:
        position = position + ours * count[:, None]
    return _Positions(index, index - position % chunk, position < chunk, ours)


def _fill(slot: Tensor, place: Tensor, slots: int, width: int, plain: bool) -> Slots:
    """Slots from the slot and the place in it of each position; slot `slots` is thrown away."""
    batch, time = slot.shape
    one_based = torch.arange(1, time + 1, device=slot.device).expand(batch, -1)
    table = torch.zeros(batch, (slots + 1) * width, dtype=torch.int64, device=slot.device)
    table = table.scatter(1, slot * width + place, one_based)
    table = table[:, : slots * width].unflatten(1, (slots, width)).transpose(0, 1)
    filled = table > 0
    if plain:
        busy = [True] * (slots - 1) + [time % width > 0 or slots == 1]
    elif _values_are_known(slot):
        busy = filled.flatten(1).any(1).tolist()
    else:
        busy = [True] * slots
    return Slots((table - 1).clamp_min(0), filled, busy)


def _values_are_known(x: Tensor) -> bool:
    return x.device.type != "meta" and has_numbers() and not torch.compiler.is_compiling()


def _by_window(ids: Tensor, at: _Positions, chunk: int, slots: int) -> tuple[Tensor, Tensor]:
    """Slots to write and to read when the chunk of a token is applied before it updates."""
    time = ids.shape[1]
    end = at.begin + chunk - 1
    inside = end < time
    ends = inside & (ids.gather(1, end.clamp_max(time - 1)) == ids)
    is_open = last_document(ids) & ~inside
    write = torch.where(ends, end // chunk, torch.where(is_open, slots - 1, slots))
    before = torch.where(at.ours, 0, slots)  # the weights of the state, or the initial ones
    return write, torch.where(at.first, before, 1 + (at.begin - 1) // chunk)


def _by_piece(ids: Tensor, at: _Positions, chunk: int, slots: int | None) -> tuple[Tensor, int]:
    """The slot of each position when every piece of a document has one, and their number, which
    depends on the documents when it is not given."""
    starts = document_starts(ids) | (at.begin == at.index) | (at.index == 0)
    piece = starts.cumsum(1) - 1
    closed = at.begin[:, -1] + chunk == ids.shape[1]
    total = piece[:, -1] + 1 + closed
    if slots is None:
        slots = int(total.max())
    return piece + (slots - total)[:, None], slots


def make_layout(
    shape: Sequence[int],
    chunk: int,
    apply_first: bool,
    segment_ids: Tensor | None,
    count: Tensor | None,
    device: torch.device,
) -> Layout:
    """The layout of `(B, T)` tokens.

    Args:
        apply_first: tokens read the weights from before their chunk, else those after it.
        count: `(B,)` tokens in the chunk that is open before the row; None for none.
    """
    time = shape[1]
    plain = segment_ids is None and count is None
    ids = segment_ids
    if ids is None:
        ids = torch.zeros(shape, dtype=torch.int64, device=device)
    at = _locate(ids, count, chunk)
    width = min(chunk, time)
    place = at.index - at.begin.clamp_min(0)
    if apply_first:
        slots = (time // chunk if plain else -(-time // chunk)) + 1
        slot, reads = _by_window(ids, at, chunk, slots)
    else:
        most = None
        if segment_ids is None:
            most = (time + (0 if plain else chunk - 1)) // chunk + 1
        slot, slots = _by_piece(ids, at, chunk, most)
        reads = slot
    write = _fill(slot, place, slots, width, plain)
    read = _fill(reads, place, slots, width, plain) if apply_first else write
    tokens, carried = write.filled.sum(-1), None
    if count is not None:
        carried = _any_token(at.first & at.ours, write)
        tokens = tokens + carried * count
    other = at.first & ~at.ours
    return Layout(
        write=write,
        read=read,
        source=torch.where(reads < slots, reads * width + place, 0),
        count=tokens,
        full=None if plain else tokens == chunk,
        fresh=None if segment_ids is None else _any_token(other, write),
        carried=carried,
        unread=other if apply_first and segment_ids is not None else None,
    )


def _any_token(flag: Tensor, slots: Slots) -> Tensor:
    """`(S, B)` bool: whether `flag` `(B, T)` is up for a token of each slot."""
    return (flag.expand(len(slots.index), -1, -1).gather(2, slots.index) & slots.filled).any(-1)
