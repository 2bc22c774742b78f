"""Pieces of a tensor small enough that what is made from them on the way stays in cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

ROW_TILE = 2**19
"""Elements that a chain of pointwise operations works on at a time on a CPU."""

_whole = False


@contextmanager
def whole_tensors() -> Iterator[None]:
    """No pieces inside, as on a GPU: for tensors without numbers, where a piece only costs time."""
    global _whole
    before, _whole = _whole, True
    try:
        yield
    finally:
        _whole = before


def has_numbers() -> bool:
    """Whether tensors have any, so that shapes may depend on them."""
    return not _whole


def values_are_known(x: Tensor) -> bool:
    """Whether looking at the values of `x` costs nothing; a subclass (fake) may have none."""
    return x.is_cpu and type(x) is Tensor and not torch.compiler.is_compiling()


class Tile(NamedTuple):
    """Rows and times of a `(B, T, C)` tensor."""

    rows: slice
    times: slice


def tiles(shape: Sequence[int], size: int, least_time: int) -> list[Tile]:
    """Tiles of `(B, T, C)` in order of time for the same rows, of about `size` elements."""
    batch, time, channels = shape
    if _whole or torch.compiler.is_compiling():  # the compiler makes its own loops
        return [Tile(slice(0, batch), slice(0, time))]
    rows = max(1, size // max(time * channels, 1))
    times = max(least_time, size // max(channels, 1))
    return [
        Tile(slice(row, min(row + rows, batch)), slice(start, min(start + times, time)))
        for row in range(0, batch, rows)
        for start in range(0, time, times)
    ]


def stays_in_cache(x: Tensor) -> bool:
    """Whether pieces of `x` are worth their launches."""
    return x.device.type == "cpu" and not (_whole or torch.compiler.is_compiling())


def row_tiles(x: Tensor) -> list[slice]:
    """Slices over the rows of `(N, D)`; one where nothing is gained by more."""
    rows = len(x)
    if stays_in_cache(x):
        rows = max(1, ROW_TILE // max(x.shape[1], 1))
    return [slice(start, start + rows) for start in range(0, len(x), max(rows, 1))]
