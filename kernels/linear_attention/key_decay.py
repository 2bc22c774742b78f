"""Gated linear attention in chunks, one decay per key channel: chunks within chunks.

GLA (arXiv 2312.06635) splits a chunk again so that no factor of exp(G_i - G_j) exceeds 1. Here the
splitting goes on by halves: at each level, rows of a second half reach columns of the first half
through the border between them, as products of per-token decays on either side. One exponential a
token is all it takes, nothing is divided, and a decay of exactly 0 is as good as any.

Letters in shapes: B batch, N chunks, C positions in a chunk (a power of two), G groups (heads of q
and k), R heads of v in a group, X = B·N·G, Y = X·R.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rondo.kernels.linear_attention.chunks import (
    LOG2_E,
    ChunkMasks,
    carry,
    chunk_masks,
    crossing_sums,
)

# Blocks up to this size are cheaper as elementwise products than as many tiny matmuls.
ELEMENTWISE = 2


class Level(NamedTuple):
    """Blocks of `2·size` positions; each second half looks at its first half."""

    size: int
    blocks: int
    after: Tensor  # (X, R, blocks, size, K): decay from the border to each row of a second half
    before: Tensor  # (X, R, blocks, size, K): decay from each column of a first half to the border


class Operands(NamedTuple):
    """Chunked inputs in the accumulation dtype; q carries the scale."""

    q: Tensor  # (X, 1, C, K)
    k: Tensor  # (X, 1, C, K)
    decay: Tensor  # (X, R, C, K): of each position
    through: Tensor  # (B, N, G, R, K, 1): over the chunk, 0 where a document starts in it
    masks: ChunkMasks | None


def key_decay_chunk(chunk_size: int, time: int) -> int:
    """The largest power of two within `chunk_size` that `time` positions can use."""
    longest = 1 << (time - 1).bit_length()
    return 1 << (min(chunk_size, longest).bit_length() - 1)


def _heads_first(x: Tensor, chunk: int, dtype: torch.dtype) -> Tensor:
    """`(B, T, h, D)` -> `(B·N, h, C, D)`, contiguous."""
    batch, time, heads, dim = x.shape
    out = torch.empty(batch, time // chunk, heads, chunk, dim, dtype=dtype, device=x.device)
    out.copy_(x.unflatten(1, (-1, chunk)).transpose(2, 3))
    return out.view(-1, heads, chunk, dim)


def _time_first(x: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """`(B·N·h, C, D)` -> `(B, T, h, D)`, contiguous; B and h are taken from `shape`."""
    (batch, _, heads, _), (chunk, dim) = shape, x.shape[1:]
    x = x.view(-1, heads, chunk, dim).transpose(1, 2)
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    return out.copy_(x).view(batch, -1, heads, dim)


def _operands(
    q: Tensor,
    k: Tensor,
    log_decay: Tensor,
    segment_ids: Tensor | None,
    scale: float,
    chunk: int,
) -> Operands:
    accumulate = torch.promote_types(q.dtype, torch.float32)
    batch, time, groups, key_dim = q.shape
    repeat = log_decay.shape[2] // groups
    qx, kx = (_heads_first(x, chunk, accumulate).view(-1, 1, chunk, key_dim) for x in (q, k))
    steps = _heads_first(log_decay, chunk, accumulate).mul_(LOG2_E)
    through = steps.sum(2).exp2_().view(batch, time // chunk, groups, repeat, key_dim, 1)
    masks = None
    if segment_ids is not None:
        masks = chunk_masks(segment_ids, chunk)
        through = through * masks.through.view(*masks.through.shape, 1, 1, 1, 1)
    decay = steps.exp2_().view(-1, repeat, chunk, key_dim)
    return Operands(qx.mul_(scale), kx, decay, through, masks)


def _levels(after: Tensor, before: Tensor) -> Iterator[Level]:
    """Levels from the smallest blocks up. `(X, R, C, K)` decays of single positions and ones,
    overwritten, end as the decays from the chunk's start and to its end."""
    groups, repeat, chunk, key_dim = after.shape
    size = 1
    while size < chunk:
        shape = (groups, repeat, chunk // (2 * size), 2, size, key_dim)
        (after1, after2), (before1, _) = (x.view(shape).unbind(3) for x in (after, before))
        yield Level(size, shape[2], after2, before1)
        before1.mul_(after2[..., -1:, :])
        after2.mul_(after1[..., -1:, :])
        size *= 2


def _halves(x: Tensor, level: Level) -> tuple[Tensor, Tensor]:
    """First and second halves `(X, r, blocks, size, K)` of the blocks of `(X, r, C, K)`."""
    first, second = x.view(*x.shape[:2], level.blocks, 2, level.size, x.shape[-1]).unbind(3)
    return first, second


def _block(scores: Tensor, level: Level) -> Tensor:
    """The rows of second halves by the columns of first halves: `(X, R, blocks, size, size)`,
    a view of `(X, R, C, C)`."""
    wide = 2 * level.size
    tiles = scores.view(*scores.shape[:2], level.blocks, wide, level.blocks, wide)
    tiles = tiles.diagonal(0, 2, 4).movedim(-1, 2)
    return tiles[..., level.size :, : level.size]


def _scores(operands: Operands, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """P `(X, R, C, C)` in `dtype`, 0 above the diagonal and between documents; q decayed from the
    chunk's start and k decayed to its end, `(Y, C, K)` in `dtype`."""
    q, k, decay, _, masks = operands
    scores = torch.zeros(*decay.shape[:3], decay.shape[2], dtype=dtype, device=q.device)
    scores.diagonal(0, -2, -1).copy_((q * k).sum(-1))
    after, before = decay.clone(), torch.ones_like(decay)
    for level in _levels(after, before):
        rows = _halves(q, level)[1] * level.after
        columns = _halves(k, level)[0] * level.before
        if level.size <= ELEMENTWISE:
            block = (rows.unsqueeze(-2) * columns.unsqueeze(-3)).sum(-1)
        else:
            block = rows @ columns.mT
        _block(scores, level).copy_(block)
    if masks is not None:
        _mask(scores, masks.same)
        _mask(after, masks.enter.unsqueeze(-1))
        _mask(before, masks.leave.unsqueeze(-1))
    return scores, (q * after).to(dtype).flatten(0, 1), (k * before).to(dtype).flatten(0, 1)


def _mask(x: Tensor, mask: Tensor) -> None:
    """Zeroes `(X, R, C, n)`, in place, where `(B, N, C, n or 1)` is False."""
    mask = mask.flatten(0, 1).unsqueeze(1)
    x.view(mask.shape[0], -1, *x.shape[2:]).mul_(mask)


def _score_gradients(operands: Operands, dscores: Tensor) -> tuple[Tensor, ...]:
    """Gradients of q and k through P below its diagonal, per head, and the decays from the
    chunk's start and to its end: `(X, R, C, K)`. Zeroes `dscores` between documents."""
    q, k, decay, _, masks = operands
    dq, dk = torch.zeros_like(decay), torch.zeros_like(decay)
    after, before = decay.clone(), torch.ones_like(decay)
    if masks is not None:
        _mask(dscores, masks.same)
    for level in _levels(after, before):
        rows = _halves(q, level)[1] * level.after
        columns = _halves(k, level)[0] * level.before
        block = _block(dscores, level).contiguous()
        if level.size <= ELEMENTWISE:
            drows = (block.unsqueeze(-1) * columns.unsqueeze(-3)).sum(-2)
            dcolumns = (block.unsqueeze(-1) * rows.unsqueeze(-2)).sum(-3)
        else:
            drows, dcolumns = block @ columns, block.mT @ rows
        _halves(dq, level)[1].addcmul_(drows, level.after)
        _halves(dk, level)[0].addcmul_(dcolumns, level.before)
    if masks is not None:
        _mask(after, masks.enter.unsqueeze(-1))
        _mask(before, masks.leave.unsqueeze(-1))
    return dq, dk, after, before


class KeyDecayAttention(torch.autograd.Function):
    """`(q, k, v, log_decay, initial_state or None, segment_ids or None, scale, chunk)` ->
    `(o, state)`; T is a multiple of `chunk`, a power of two, and log_decay is `(B, T, H, K)`."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        q, k, v, log_decay, initial_state, segment_ids, scale, chunk = arguments
        operands = _operands(q, k, log_decay, segment_ids, scale, chunk)
        scores, read, write = _scores(operands, v.dtype)
        values = _heads_first(v, chunk, v.dtype).flatten(0, 1)
        states, last = _run_chunks(write.mT @ values, operands.through, initial_state, v.dtype)
        o = torch.bmm(scores.flatten(0, 1), values).baddbmm_(read, states)
        ctx.save_for_backward(q, k, values, log_decay, segment_ids, scores, states)
        ctx.scale, ctx.chunk = scale, chunk
        ctx.state_dtype = None if initial_state is None else initial_state.dtype
        ctx.set_materialize_grads(False)
        return _time_first(o, v.shape, v.dtype), last.flatten(1, 2).contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        q, k, values, log_decay, segment_ids, scores, states = ctx.saved_tensors
        (do, dlast), dtype = grad_outputs, values.dtype
        operands = _operands(q, k, log_decay, segment_ids, ctx.scale, ctx.chunk)
        if do is None:
            douts = torch.zeros_like(values)
        else:
            douts = _heads_first(do, ctx.chunk, dtype).flatten(0, 1)
        dscores = torch.bmm(douts, values.mT).view_as(scores).to(operands.q.dtype)
        dq, dk, after, before = _score_gradients(operands, dscores)
        read, write = ((x * f).to(dtype) for x, f in ((operands.q, after), (operands.k, before)))
        added = read.flatten(0, 1).mT @ douts
        dstates, dfirst = _run_chunks(added, operands.through, dlast, dtype, reverse=True)
        dvalues = (scores.flatten(0, 1).mT @ douts).baddbmm_(write.flatten(0, 1), dstates)
        dread = (douts @ states.mT).view_as(after) * after
        dwrite = (values @ dstates.mT).view_as(before) * before
        dgate = dinitial = None
        if ctx.needs_input_grad[3]:
            dgate = crossing_sums(
                (operands.q * (dread + dq) - operands.k * dk).flatten(0, 1),
                (operands.k * dwrite).flatten(0, 1),
                (states * dstates).sum(-1).unsqueeze(1) * operands.through.view(len(states), 1, -1),
            )
            dgate = _time_first(dgate, log_decay.shape, log_decay.dtype)
        if ctx.needs_input_grad[4]:
            dinitial = dfirst.flatten(1, 2).to(ctx.state_dtype)
        diagonal = dscores.diagonal(0, -2, -1).unsqueeze(-1)
        dq = dq.add_(dread).addcmul_(diagonal, operands.k).sum(1).mul_(ctx.scale)
        dk = dk.add_(dwrite).addcmul_(diagonal, operands.q).sum(1)
        dv = _time_first(dvalues, (*log_decay.shape[:3], -1), dtype)
        dq, dk = (_time_first(x, q.shape, dtype) for x in (dq, dk))
        return dq, dk, dv, dgate, dinitial, None, None, None


def _run_chunks(
    added: Tensor,
    through: Tensor,
    first: Tensor | None,
    dtype: torch.dtype,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """The recurrence over chunks: `(Y, K, V)` written by each -> the state each one meets,
    `(Y, K, V)` in `dtype`, and the last state `(B, G, R, K, V)`."""
    batch, chunks, groups, repeat = through.shape[:4]
    added = added.view(batch, chunks, groups, repeat, *added.shape[1:]).to(through.dtype)
    if first is not None:
        first = first.to(through.dtype).view(batch, groups, repeat, *first.shape[2:])
    met, last = carry(added, through, first, dtype, reverse)
    return met.flatten(0, 3), last
