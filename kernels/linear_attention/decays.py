"""Decay factors between the positions of a chunk, for one decay per head or none.

Letters in shapes: B batch, N chunks, C positions in a chunk, G groups (heads of q and k), R heads
of v in a group, X = B·N·G.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rondo.kernels.linear_attention.chunks import (
    LOG2_E,
    MIN_LOG_DECAY,
    ChunkMasks,
)

SUB_CHUNK = 16


class Sizes(NamedTuple):
    """The letters of the module's shapes."""

    batch: int
    chunks: int
    chunk: int
    groups: int
    repeat: int
    key_dim: int
    value_dim: int


class Decays(NamedTuple):
    """Decay factors of every chunk, in [0, 1] and 0 between documents; None stands for 1."""

    pairs: Tensor  # (X, R, C, C) from j to i, lower triangular; no gate: (X or 1, 1, C, C)
    enter: Tensor | None  # (X, C, R, 1) from before the chunk to i
    leave: Tensor | None  # (X, C, R, 1) from j to the end of the chunk
    through: Tensor | None  # (B, N, G, 1, R, 1) over the whole chunk, accumulation dtype


def _pair_decays(sums: Tensor, dtype: torch.dtype) -> Tensor:
    """exp2(sums_i - sums_j) for j <= i and 0 elsewhere: `(..., C)` float64 -> `(..., C, C)`.

    Rows of a sub-chunk reach columns before it through the sub-chunk's start, as the product of
    two factors below 1, so that exponentials are taken on the diagonal blocks only.
    """
    chunk = sums.shape[-1]
    block = SUB_CHUNK if chunk % SUB_CHUNK == 0 else chunk
    blocks = chunk // block
    rows = sums.unflatten(-1, (blocks, block))
    diagonal = (rows.unsqueeze(-1) - rows.unsqueeze(-2)).to(dtype)
    diagonal = diagonal.clamp_max_(0.0).exp2_().tril_()  # above it, differences are positive
    if blocks == 1:
        return diagonal.squeeze(-3)
    start = torch.cat([torch.zeros_like(rows[..., :1, 0]), rows[..., :-1, -1]], dim=-1)
    index = torch.arange(chunk, device=sums.device)
    outside = index >= block * torch.arange(blocks, device=sums.device).unsqueeze(-1)
    from_start = (rows - start.unsqueeze(-1)).to(dtype).exp2()
    to_start = (start.unsqueeze(-1) - sums.unsqueeze(-2)).to(dtype)
    to_start = to_start.masked_fill_(outside, -torch.inf).exp2_()
    pairs = from_start.unsqueeze(-1) * to_start.unsqueeze(-2)
    pairs.unflatten(-1, (blocks, block)).diagonal(0, -4, -2).copy_(diagonal.movedim(-3, -1))
    return pairs.flatten(-3, -2)


def chunk_decays(
    log_decay: Tensor | None, masks: ChunkMasks | None, sizes: Sizes, v: Tensor
) -> Decays:
    """Factors of a padded `(B, T, H)` gate. Sums run in float64: a difference of float32 sums
    keeps no digits once -1e4 is in them."""
    batch, chunks, chunk, groups, repeat, _, _ = sizes
    accumulate = torch.promote_types(v.dtype, torch.float32)
    same = None if masks is None else masks.same.unsqueeze(2)
    if log_decay is None:
        pairs = torch.ones(1, 1, chunk, chunk, dtype=v.dtype, device=v.device).tril()
        if masks is None or same is None:
            return Decays(pairs, None, None, None)
        pairs = (same * pairs[0]).expand(-1, -1, groups, -1, -1).reshape(-1, 1, chunk, chunk)
        enter, leave = (
            x.to(v.dtype).unsqueeze(2).expand(-1, -1, groups, -1).reshape(-1, chunk, 1, 1)
            for x in (masks.enter, masks.leave)
        )
        through = masks.through.to(accumulate).reshape(batch, chunks, 1, 1, 1, 1)
        return Decays(pairs, enter, leave, through)
    steps = log_decay.double().clamp_min(MIN_LOG_DECAY) * LOG2_E
    sums = steps.unflatten(1, (chunks, chunk)).transpose(2, 3).contiguous().cumsum(-1)
    pairs = _pair_decays(sums, accumulate).to(v.dtype)
    enter = sums.to(accumulate).exp2()
    leave = (sums[..., -1:] - sums).to(accumulate).exp2()
    through = enter[..., -1]
    if masks is not None and same is not None:
        pairs = pairs.mul_(same)
        enter = enter * masks.enter.unsqueeze(2)
        leave = leave * masks.leave.unsqueeze(2)
        through = through * masks.through.unsqueeze(-1)
    enter, leave = (
        x.to(v.dtype).reshape(-1, repeat, chunk, 1).transpose(1, 2) for x in (enter, leave)
    )
    through = through.reshape(batch, chunks, groups, 1, repeat, 1)
    return Decays(pairs.reshape(-1, repeat, chunk, chunk), enter, leave, through)
