"""Pieces of a tensor small enough that what is made from them on the way stays in cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

ROW_TILE = 2**19
"""Elements that a chain of pointwise operations works on at a time on a CPU."""


class Tile(NamedTuple):
    """Rows and times of a `(B, T, C)` tensor."""

    rows: slice
    times: slice


def tiles(shape: Sequence[int], size: int, least_time: int) -> list[Tile]:
    """Tiles of `(B, T, C)` in order of time for the same rows, of about `size` elements."""
    batch, time, channels = shape
    if torch.compiler.is_compiling():  # the compiler makes its own loops, and unrolls these
        return [Tile(slice(0, batch), slice(0, time))]
    rows = max(1, size // max(time * channels, 1))
    times = max(least_time, size // max(channels, 1))
    return [
        Tile(slice(row, min(row + rows, batch)), slice(start, min(start + times, time)))
        for row in range(0, batch, rows)
        for start in range(0, time, times)
    ]


def row_tiles(x: Tensor) -> list[slice]:
    """Slices over the rows of `(N, D)`; one where nothing is gained by more."""
    rows = len(x)
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        rows = max(1, ROW_TILE // max(x.shape[1], 1))
    return [slice(start, start + rows) for start in range(0, len(x), max(rows, 1))]
