"""Launches of the linear scan's kernels (`triton_scan.py`)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from rondo.kernels.scan.triton_scan import scan_backward, scan_borders, scan_chunks, scan_forward
from rondo.kernels.triton_configs import Config
from rondo.kernels.triton_support import resident_programs

PIECE = 64
"""Positions: chunks are as many pieces long, of whole tiles whatever their size in the table.
Cutting rows further costs a second pass over the factors for little."""
BLOCK = 64
"""Channels of a program, about, when programs are counted."""


class Cut(NamedTuple):
    """How rows are cut, the same for all configurations."""

    chunks: int
    length: int
    """Positions of a chunk."""


def cut_rows(a: Tensor) -> Cut:
    """As many chunks as fill the chip."""
    batch, time, width = a.shape
    pieces = triton.cdiv(time, PIECE)
    wanted = resident_programs(a.device) // (batch * triton.cdiv(width, BLOCK))
    of_chunk = triton.cdiv(pieces, max(1, min(wanted, pieces)))
    return Cut(triton.cdiv(pieces, of_chunk), of_chunk * PIECE)


def maps_like(a: Tensor, cut: Cut) -> Tensor:
    """For `chunk_maps`, without numbers."""
    return a.new_empty(2, a.shape[0], cut.chunks, a.shape[2], dtype=torch.float32)


def chunk_maps(
    a: Tensor,
    b: Tensor | None,
    ids: Tensor | None,
    reverse: bool,
    cut: Cut,
    maps: Tensor,
    config: Config,
) -> None:
    """Writes of every chunk the product of its factors and its state from zero: `(2, B, N, W)`."""
    batch, time, width = a.shape
    blocks = triton.cdiv(width, config["BLOCK"])
    scan_chunks[(batch * cut.chunks * blocks,)](
        a, b, ids, *maps, time, cut.length, cut.chunks, blocks, width, REVERSE=reverse, **config
    )


def borders(
    maps: Tensor,
    first: Tensor | None,
    incoming: Tensor | None,
    whole: tuple[Tensor, Tensor] | tuple[None, None],
    reverse: bool,
    config: Config,
) -> None:
    """Writes the states that enter chunks into `incoming` `(B, N, W)`, and what all chunks do
    together into `whole`, product and state `(B, W)`."""
    _, batch, chunks, width = maps.shape
    blocks = triton.cdiv(width, config["BLOCK"])
    others = {name: value for name, value in config.items() if name != "TIME"}
    scan_borders[(batch * blocks,)](
        *maps, first, incoming, *whole, chunks, blocks, width, REVERSE=reverse, **others
    )


def enter(
    a: Tensor,
    b: Tensor | None,
    first: Tensor | None,
    ids: Tensor | None,
    reverse: bool,
    cut: Cut,
    config: Config,
) -> Tensor | None:
    """The state that enters each chunk, `(B, N, W)`, or None for zeros."""
    if cut.chunks == 1:
        return first
    maps = maps_like(a, cut)
    chunk_maps(a, b, ids, reverse, cut, maps, config)
    incoming = torch.empty_like(maps[0])
    borders(maps, first, incoming, (None, None), reverse, config)
    return incoming


def scan_outputs(
    a: Tensor,
    b: Tensor | None,
    ids: Tensor | None,
    incoming: Tensor | None,
    results: tuple[Tensor, Tensor],
    cut: Cut,
    config: Config,
) -> None:
    """Writes h and the last state."""
    batch, time, width = a.shape
    blocks = triton.cdiv(width, config["BLOCK"])
    scan_forward[(batch * cut.chunks * blocks,)](
        a, b, ids, incoming, *results, time, cut.length, cut.chunks, blocks, width, **config
    )


def scan_gradients(
    a: Tensor,
    h: Tensor,
    first: Tensor | None,
    ids: Tensor | None,
    grad: Tensor | None,
    incoming: Tensor | None,
    results: tuple[Tensor, Tensor, Tensor | None],
    cut: Cut,
    config: Config,
) -> None:
    """Writes the gradients of a, b and the first state."""
    batch, time, width = a.shape
    blocks = triton.cdiv(width, config["BLOCK"])
    scan_backward[(batch * cut.chunks * blocks,)](
        a, h, first, ids, grad, incoming, *results, time, cut.length, cut.chunks, blocks, width,
        **config,
    )  # fmt: skip


def contiguous(*tensors: Tensor | None) -> Any:
    """The same tensors, laid out row by row."""
    return [None if x is None else x.contiguous() for x in tensors]
