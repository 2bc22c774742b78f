"""Pieces of time in which every row stays within one segment of one document."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rondo.kernels.segments import document_positions, document_starts, first_document
from rondo.kernels.tiles import has_numbers


class Segments(NamedTuple):
    """Positions `[start, stop)`."""

    start: int
    stop: int
    begins: Tensor | None
    """`(B,)` bool: a document begins here that is not the initial state's; None: nowhere."""
    renews: Tensor | None
    """`(B,)` bool: a segment begins here; None: nowhere."""
    fresh: bool
    """In every row a segment begins here."""


def pieces(
    shape: Sequence[int],
    size: int,
    longest: int,
    segment_ids: Tensor | None,
    count: Tensor | None,
    device: torch.device,
) -> list[Segments]:
    """Pieces of rows `(B, T)` in order, none longer than `longest` tokens.

    Args:
        size: tokens of a segment; segments count from the start of their document.
        count: `(B,)` tokens of the segment that is open before position 0, `size` when it is
            complete; None: rows begin with a document.
    """
    batch, time = shape
    plain = segment_ids is None and count is None
    if plain or not has_numbers():
        every = torch.ones(batch, dtype=torch.bool, device=device)
        starts = sorted({*range(0, time, size), *range(0, time, longest)})
        found = [(start, None, every if start % size == 0 else None) for start in starts]
        return _pieces(found, time, [start % size == 0 for start in starts])
    if segment_ids is None:
        segment_ids = torch.zeros(batch, time, dtype=torch.int64, device=device)
    place = document_positions(segment_ids)
    if count is not None:
        place = place + first_document(segment_ids) * count[:, None]
    renews, begins = place % size == 0, document_starts(segment_ids)
    if time == 1:
        return [Segments(0, 1, None, renews[:, 0], False)]
    some, every = torch.stack([renews.any(0), renews.all(0)]).tolist()
    borders = {0, *(t for t in range(time) if some[t])}
    starts = sorted(borders | {t for b in borders for t in _steps(b, borders, time, longest)})
    found = [(t, begins[:, t], renews[:, t] if some[t] else None) for t in starts]
    return _pieces(found, time, [every[t] for t in starts])


def _steps(border: int, borders: set[int], time: int, longest: int) -> range:
    """Further starts between a border and the next."""
    stop = min((b for b in borders if b > border), default=time)
    return range(border, stop, longest)


def _pieces(
    found: Sequence[tuple[int, Tensor | None, Tensor | None]], time: int, fresh: list[bool]
) -> list[Segments]:
    stops = [*(start for start, _, _ in found[1:]), time]
    return [
        Segments(start, stop, begins, renews, alone)
        for (start, begins, renews), stop, alone in zip(found, stops, fresh, strict=True)
    ]
