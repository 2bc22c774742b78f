"""Gated linear attention in chunks, one decay per head or none: matmuls and a hand-made backward.

Mamba-2's state-space duality (arXiv 2405.21060). With S the state before a chunk and G the log
decays summed from the chunk's start:

    P = (Q K^T) * exp(G_i - G_j) for j <= i        O  = s P V + s exp(G) * (Q S)
    S_next = exp(G_C) S + K^T (exp(G_C - G) * V)

Letters in shapes: see `decays`. Tensors of a group keep its heads side by side, `(X, C, R·V)`, so
that one product serves them all and q and k are never copied over heads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rondo.kernels.linear_attention.chunks import carry, chunk_masks, crossing_sums
from rondo.kernels.linear_attention.decays import Decays, Sizes, chunk_decays


def _group_major(x: Tensor, sizes: Sizes) -> Tensor:
    """`(B, T, G·r, D)` -> `(X, C, r·D)` for any r, contiguous; no copy when it already is."""
    x = x.reshape(sizes.batch, sizes.chunks, sizes.chunk, sizes.groups, -1)
    return x.transpose(2, 3).reshape(-1, sizes.chunk, x.shape[-1]).contiguous()


def _head_major(x: Tensor, sizes: Sizes) -> Tensor:
    """`(X, C, R·V)` -> `(X·R, C, V)`; a view when a group has one head."""
    x = x.unflatten(-1, (sizes.repeat, sizes.value_dim))
    return x.transpose(1, 2).reshape(-1, sizes.chunk, sizes.value_dim)


def _time_major(x: Tensor, sizes: Sizes) -> Tensor:
    """`(X, C, r·D)` -> `(B, T, G, r·D)`, contiguous."""
    x = x.unflatten(0, (sizes.batch, sizes.chunks, sizes.groups)).transpose(2, 3)
    return x.reshape(sizes.batch, sizes.chunks * sizes.chunk, sizes.groups, -1)


def _scaled_product(scale: float, left: Tensor, right: Tensor) -> Tensor:
    """`scale * left @ right`, scaled before it is rounded."""
    return torch.baddbmm(left.new_empty(1, 1, 1), left, right, beta=0, alpha=scale)


def _per_head(x: Tensor, sizes: Sizes) -> Tensor:
    """`(X, n, R·V)` -> `(X, n, R, V)`, a view."""
    return x.view(x.shape[0], x.shape[1], sizes.repeat, sizes.value_dim)


def _scale_heads(x: Tensor, factor: Tensor | None, sizes: Sizes) -> Tensor:
    """`(X, C, R·V)` times a factor per position and head."""
    return x if factor is None else (_per_head(x, sizes) * factor).view_as(x)


def _mix(scores: Tensor, x: Tensor, inter: Tensor, factor: Tensor | None, sizes: Sizes) -> Tensor:
    """`scores @ x + factor * inter` as `(B, T, H, V)`, for `(X, C, R·V)` x and inter and scores
    per head `(X·R, C, C)` or per group `(X, C, C)`."""
    if scores.shape[0] == x.shape[0]:
        out = _per_head(torch.bmm(scores, x), sizes)
    else:
        out = torch.bmm(scores, _head_major(x, sizes))
        out = out.view(-1, sizes.repeat, sizes.chunk, sizes.value_dim).transpose(1, 2)
    inter = _per_head(inter, sizes)
    out = out.add_(inter) if factor is None else out.addcmul_(inter, factor)
    shape = (sizes.batch, sizes.chunks, sizes.groups, *out.shape[1:])
    heads = sizes.groups * sizes.repeat
    return out.view(shape).transpose(2, 3).reshape(sizes.batch, -1, heads, sizes.value_dim)


def _pairwise(qk: Tensor, pairs: Tensor) -> Tensor:
    """P per head, or per group without a gate: `(X·R or X, C, C)`."""
    return (qk.unsqueeze(1) * pairs).flatten(0, 1)


def _outer_heads(do: Tensor, v: Tensor, pairs: Tensor, sizes: Sizes) -> Tensor:
    """Gradient of the scaled `Q K^T` through each head, `(X, R, C, C)`; without a gate through
    all heads of a group at once, `(X, 1, C, C)`."""
    if pairs.shape[1] == 1:
        product = torch.bmm(do, v.transpose(1, 2))
    else:
        product = torch.bmm(_head_major(do, sizes), _head_major(v, sizes).transpose(1, 2))
    return product.unflatten(0, (do.shape[0], -1)).mul_(pairs)


def _split_state(state: Tensor, sizes: Sizes) -> Tensor:
    """`(B, H, K, V)` -> `(B, G, K, R, V)`."""
    return state.unflatten(1, (sizes.groups, sizes.repeat)).transpose(2, 3)


def _join_state(state: Tensor) -> Tensor:
    """`(B, G, K, R, V)` -> `(B, H, K, V)`."""
    return state.transpose(2, 3).flatten(1, 2).contiguous()


def _run_chunks(
    added: Tensor,
    through: Tensor | None,
    first: Tensor | None,
    sizes: Sizes,
    dtype: torch.dtype,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """The recurrence over chunks: `(X, K, R·V)` written by each -> the state each one meets, in
    `dtype`, and the last state `(B, G, K, R, V)`, both accumulated in at least float32."""
    accumulate = torch.promote_types(dtype, torch.float32)
    added = _per_head(added, sizes).unflatten(0, (sizes.batch, sizes.chunks, sizes.groups))
    first = None if first is None else first.to(accumulate)
    met, last = carry(added.to(accumulate), through, first, dtype, reverse)
    return met.flatten(0, 2).flatten(-2), last


def _gate_gradient(
    pairs: Tensor, reads: Tensor, writes: Tensor, passing: Tensor, through: Tensor, sizes: Sizes
) -> Tensor:
    """Gradient of the log decay, `(B, T, H)`, from every term that decays across a position.

    Position t collects the pairs j < t <= i, the reads of the entering state at i >= t, the
    writes at j < t and the state that passes through the chunk. Summing these parts keeps the
    digits that q·dq - k·dk, summed over whole gradients, loses.

    Args:
        pairs: `(X, R, C, C)`, P times its gradient, in the accumulation dtype so that its row and
            column sums cancel where they must; its diagonal is overwritten.
        reads: `(X, C, R)`, output read from the entering state, times its gradient.
        writes: `(X, C, R)`, value written to the leaving state, times its gradient.
        passing: `(X, K, R)`, entering state times gradient of the leaving one.
    """
    accumulate = through.dtype
    pairs.diagonal(0, -2, -1).zero_()  # a position paired with itself crosses nothing
    reads = (pairs.sum(-1) - pairs.sum(-2)).transpose(1, 2) + reads
    passing = passing.sum(1, keepdim=True, dtype=accumulate) * through.view(-1, 1, sizes.repeat)
    gradient = crossing_sums(reads, writes.to(accumulate), passing)
    return _time_major(gradient, sizes).flatten(2, 3)


def _head_dots(x: Tensor, y: Tensor, sizes: Sizes) -> Tensor:
    """Inner products over V of the heads of two `(X, n, R·V)`, overwriting x: `(X, n, R)`."""
    return _per_head(x.mul_(y), sizes).sum(-1)


class HeadDecayAttention(torch.autograd.Function):
    """`(q, k, v, log_decay or None, initial_state or None, segment_ids or None, scale, chunk)`
    -> `(o, state)`; T is a multiple of `chunk` and log_decay is `(B, T, H)`."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        q, k, v, log_decay, initial_state, segment_ids, scale, chunk = arguments
        batch, time, heads, value_dim = v.shape
        groups = q.shape[2]
        sizes = Sizes(batch, time // chunk, chunk, groups, heads // groups, q.shape[3], value_dim)
        masks = None if segment_ids is None else chunk_masks(segment_ids, chunk)
        decays = chunk_decays(log_decay, masks, sizes, v)
        first = None if initial_state is None else _split_state(initial_state, sizes)
        qx, kx, vx = (_group_major(x, sizes) for x in (q, k, v))
        added = torch.bmm(kx.transpose(1, 2), _scale_heads(vx, decays.leave, sizes))
        states, last = _run_chunks(added, decays.through, first, sizes, v.dtype)
        qk = _scaled_product(scale, qx, kx.transpose(1, 2))
        inter = _scaled_product(scale, qx, states)
        o = _mix(_pairwise(qk, decays.pairs), vx, inter, decays.enter, sizes)
        ctx.save_for_backward(qx, kx, vx, states, *decays)
        ctx.dtypes = [None if x is None else x.dtype for x in (log_decay, initial_state)]
        ctx.sizes, ctx.scale = sizes, scale
        ctx.set_materialize_grads(False)
        return o, _join_state(last)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        qx, kx, vx, states, *factors = ctx.saved_tensors
        decays, sizes, scale = Decays(*factors), ctx.sizes, ctx.scale
        do, dlast = grad_outputs
        dox = torch.zeros_like(vx) if do is None else _group_major(do, sizes)
        entered = _scale_heads(dox, decays.enter, sizes)
        left = _scale_heads(vx, decays.leave, sizes)
        added = _scaled_product(scale, qx.transpose(1, 2), entered)
        first = None if dlast is None else _split_state(dlast, sizes)
        dstates, dfirst = _run_chunks(added, decays.through, first, sizes, vx.dtype, reverse=True)
        qk = _scaled_product(scale, qx, kx.transpose(1, 2))
        dscores = _outer_heads(dox, vx, decays.pairs, sizes).to(dfirst.dtype)
        dqk = dscores.sum(1).to(vx.dtype)
        dinter = torch.bmm(kx, dstates)
        dv = _mix(_pairwise(qk, decays.pairs).mT, dox, dinter, decays.leave, sizes)
        dq = torch.bmm(entered, states.transpose(1, 2)).baddbmm_(dqk, kx).mul_(scale)
        dk = torch.bmm(left, dstates.transpose(1, 2)).baddbmm_(dqk.transpose(1, 2), qx, alpha=scale)
        dgate = None
        if ctx.needs_input_grad[3] and decays.through is not None:
            # Last, because the products below overwrite what the other gradients needed.
            dgate = _gate_gradient(
                dscores.mul_(qk.unsqueeze(1)),
                _head_dots(entered, _scaled_product(scale, qx, states), sizes),
                _head_dots(left, dinter, sizes),
                _head_dots(dstates, states, sizes),
                decays.through,
                sizes,
            ).to(ctx.dtypes[0])
        dinitial = _join_state(dfirst).to(ctx.dtypes[1]) if ctx.needs_input_grad[4] else None
        dq, dk = (_time_major(x, sizes) for x in (dq, dk))
        return dq, dk, dv, dgate, dinitial, None, None, None
