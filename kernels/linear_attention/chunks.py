"""Chunks of a packed row: who sees whom across their borders, and the recurrence between them.

Letters in shapes: B batch, N chunks, C positions in a chunk, T = N·C.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

LOG2_E = 1.4426950408889634
# exp(-800) is exactly 0 in float64 too: clamping changes nothing and keeps every sum finite.
MIN_LOG_DECAY = -800.0


class ChunkMasks(NamedTuple):
    """Which pairs of positions belong to one document, seen chunk by chunk (all bool)."""

    same: Tensor  # (B, N, C, C): both positions lie in one document
    enter: Tensor  # (B, N, C): the document of this position was already open before the chunk
    leave: Tensor  # (B, N, C): the document of this position is still open after the chunk
    through: Tensor  # (B, N): one document spans the whole chunk and was open before it


def chunk_masks(segment_ids: Tensor, chunk: int) -> ChunkMasks:
    """Masks of `(B, T)` document ids, T a multiple of `chunk`. What lies before position 0
    belongs to the document of position 0."""
    ids = segment_ids.unflatten(1, (-1, chunk))
    last = ids[:, :, -1]
    before = torch.cat([ids[:, :1, 0], last[:, :-1]], dim=1)
    return ChunkMasks(
        same=ids.unsqueeze(-1) == ids.unsqueeze(-2),
        enter=ids == before.unsqueeze(-1),
        leave=ids == last.unsqueeze(-1),
        through=before == last,
    )


def sums_from(x: Tensor, dim: int) -> Tensor:
    """Sum of each element and those after it along `dim`."""
    return x.flip(dim).cumsum(dim).flip(dim)


def sums_after(x: Tensor, dim: int) -> Tensor:
    """Sum of the elements after each one along `dim`. Shifted, not subtracted: a difference would
    lose the digits of small elements beside large ones."""
    nothing = torch.zeros_like(x.narrow(dim, 0, 1))
    return torch.cat([sums_from(x, dim).narrow(dim, 1, x.shape[dim] - 1), nothing], dim)


def crossing_sums(reads: Tensor, writes: Tensor, passing: Tensor) -> Tensor:
    """Gradient of log decays `(n, C, ...)` from what decays across each position: what later
    positions read (its own included), what earlier ones wrote, and what passes the whole chunk.

    Each sum takes in only what it is about, so that neither a later output nor another document
    leaves its rounding errors here.
    """
    gradient = sums_from(reads, 1).add_(passing)
    gradient[:, 1:].add_(writes[:, :-1].cumsum(1))
    return gradient


def pad_time(x: Tensor, pad: int) -> Tensor:
    """Appends `pad` zero positions to `(B, T, ...)`: a key of zero writes nothing and a log decay
    of zero forgets nothing."""
    return F.pad(x, (0, 0) * (x.dim() - 2) + (0, pad)) if pad else x


def pad_segments(segment_ids: Tensor | None, pad: int) -> Tensor | None:
    """Appends `pad` positions to the last document of every row."""
    if segment_ids is None or pad == 0:
        return segment_ids
    return torch.cat([segment_ids, segment_ids[:, -1:].expand(-1, pad)], dim=1)


def carry(
    local: Tensor,
    factor: Tensor | None,
    first: Tensor | None,
    dtype: torch.dtype,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """Runs `x <- factor_n * x + local_n` over the chunks, overwriting `local`.

    Args:
        local: `(B, N, ...)` what each chunk adds, in the accumulation dtype.
        factor: `(B, N, ...)` broadcastable to `local`, or None for 1.
        first: `(B, ...)` x before the first chunk visited, or None for 0.
        dtype: dtype of the first result.
        reverse: visit the chunks from last to first.

    Returns:
        x before each chunk is visited, `(B, N, ...)` in `dtype`, and x after the last one visited.
    """
    chunks = local.unbind(1)
    factors = None if factor is None else factor.unbind(1)
    order = range(len(chunks))
    x = first
    for n in reversed(order) if reverse else order:
        if x is not None and factors is None:
            chunks[n].add_(x)
        elif x is not None and factors is not None:
            chunks[n].addcmul_(factors[n], x)
        x = chunks[n]
    entering = torch.empty_like(local, dtype=dtype)
    head, tail, done = (
        (entering[:, -1], entering[:, :-1], local[:, 1:])
        if reverse
        else (entering[:, 0], entering[:, 1:], local[:, :-1])
    )
    tail.copy_(done)
    if first is None:
        head.zero_()
    else:
        head.copy_(first)
    return entering, chunks[0 if reverse else -1]
