"""Attention by blocks of queries against the stretch of keys that they can see.

A block of C queries meets at most `C + window - 1` keys, so a sliding window costs
O(T * (C + window)) time, and memory is one block of scores. Query heads of a group are stacked as
rows of the same product, so that keys and values are never repeated. On a CPU these few large
matrix products, forward and backward, take about 0.4 of the time of torch's fused attention in
bfloat16 (and 0.8 in float32); on a GPU plain causal attention goes to the fused kernel.

The backward follows Dao et al. 2022 (FlashAttention), section 3: `dS = P * (dP - sum(P * dP))`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from rondo.kernels.softmax_attention.visibility import hidden_keys

BLOCK = 256
"""Queries in a block; half as many under a window, of which every block meets all keys."""
KEPT_KEYS = 512
"""Attention weights are kept for the backward pass while no block sees more keys than this (then
they are no larger than the other activations), and computed again beyond."""


class Block(NamedTuple):
    """Queries `[start, stop)` and the keys `[low, high)` that at least one of them sees."""

    start: int
    stop: int
    low: int
    high: int


class Mask(NamedTuple):
    """What decides which keys a query sees."""

    window: int | None
    segment_ids: Tensor | None
    key_segment_ids: Tensor | None


def chunked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None,
    scale: float,
    segment_ids: Tensor | None,
    key_segment_ids: Tensor | None,
) -> Tensor:
    """See `attention`."""
    plain = window is None and segment_ids is None
    same_length = q.shape[1] == k.shape[1]
    if plain and (q.shape[1] == 1 or (same_length and q.device.type == "cuda")):
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            is_causal=same_length,
            scale=scale,
            enable_gqa=q.shape[2] != k.shape[2],
        )
        return out.transpose(1, 2)
    if q.device.type == "cuda":
        return masked_sdpa(q, k, v, window, scale, segment_ids, key_segment_ids)
    return _BlockedAttention.apply(q, k, v, window, scale, segment_ids, key_segment_ids, False)


def chunked_attention_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None,
    scale: float,
    segment_ids: Tensor | None,
    key_segment_ids: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `attention`, with the log-sum-exp."""
    return _BlockedAttention.apply(q, k, v, window, scale, segment_ids, key_segment_ids, True)


def masked_sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None,
    scale: float,
    segment_ids: Tensor | None,
    key_segment_ids: Tensor | None,
) -> Tensor:
    """See `attention`: torch's fused attention with a boolean mask `(B or 1, 1, T, S)`."""
    time, keys = q.shape[1], k.shape[1]
    hidden = hidden_keys(
        (0, time), (0, keys), keys - time, window, segment_ids, key_segment_ids, q.device
    )
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=~hidden[:, None],
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.transpose(1, 2)


def _block_size(window: int | None) -> int:
    return BLOCK if window is None else max(1, BLOCK // 2)


def _blocks(time: int, keys: int, window: int | None) -> list[Block]:
    """The blocks of queries in order."""
    offset, size = keys - time, _block_size(window)
    return [
        Block(
            start,
            min(start + size, time),
            0 if window is None else max(0, offset + start - window + 1),
            offset + min(start + size, time),
        )
        for start in range(0, time, size)
    ]


def _rows(x: Tensor, groups: int) -> Tensor:
    """`(B, C, H, D)` to `(B * G, H / G * C, D)`: the queries that share keys, stacked."""
    batch, time, heads, dim = x.shape
    x = x.reshape(batch, time, groups, heads // groups, dim).permute(0, 2, 3, 1, 4)
    return x.reshape(batch * groups, -1, dim)


def _unrows(x: Tensor, like: Tensor) -> Tensor:
    """The inverse of `_rows`; `like` is any `(B, C, H, _)`."""
    batch, time, heads, _ = like.shape
    groups = x.shape[0] // batch
    x = x.view(batch, groups, heads // groups, time, x.shape[-1]).permute(0, 3, 1, 2, 4)
    return x.reshape(batch, time, heads, x.shape[-1])


def _product(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """`scale * a @ b`, scaled before it is rounded to the dtype of `a`."""
    unused = a.new_empty(())
    return torch.baddbmm(unused, a, b, beta=0, alpha=scale)


def _scores(q: Tensor, k: Tensor, block: Block, offset: int, scale: float, mask: Mask) -> Tensor:
    """Scores `(B * G, R * C, K)` of a block, -inf where hidden; q and k are its rows."""
    scores = _product(q, k.transpose(1, 2), scale)
    low = block.low
    if mask.window is None and mask.segment_ids is None:
        low = offset + block.start  # keys before the block are seen by every query in it
    hidden = hidden_keys(
        (block.start, block.stop),
        (low, block.high),
        offset,
        mask.window,
        mask.segment_ids,
        mask.key_segment_ids,
        q.device,
    )
    time = block.stop - block.start
    batch = hidden.shape[0]
    view = scores.view(batch, -1, time, scores.shape[-1])[..., low - block.low :]
    # Adding is many times faster on a CPU than filling by a mask that is broadcast.
    bias = torch.zeros_like(hidden, dtype=scores.dtype).masked_fill_(hidden, float("-inf"))
    view.add_(bias[:, None])
    return scores


class _BlockedAttention(torch.autograd.Function):
    """Saves q, k, v and, for short key ranges, the weights."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        window: int | None,
        scale: float,
        segment_ids: Tensor | None,
        key_segment_ids: Tensor | None,
        return_lse: bool,
    ) -> Tensor | tuple[Tensor, Tensor]:
        groups, offset = k.shape[2], k.shape[1] - q.shape[1]
        mask = Mask(window, segment_ids, key_segment_ids)
        keys, values = _rows(k, groups), _rows(v, groups)
        blocks = _blocks(q.shape[1], k.shape[1], window)
        keep = (k.shape[1] if window is None else _block_size(window) + window - 1) <= KEPT_KEYS
        out = v.new_empty(*q.shape[:3], v.shape[-1])
        kept, sums = [], []
        for block in blocks:
            start, stop, low, high = block
            queries = q[:, start:stop]
            scores = _scores(_rows(queries, groups), keys[:, low:high], block, offset, scale, mask)
            weights = torch.softmax(scores, -1)
            out[:, start:stop] = _unrows(weights @ values[:, low:high], queries)
            if keep:
                kept.append(weights)
            if return_lse:
                sums.append(_unrows(_lse(scores), queries))
        ctx.save_for_backward(q, keys, values, segment_ids, key_segment_ids, *kept)
        ctx.window, ctx.scale, ctx.groups = window, scale, groups
        return (out, torch.cat(sums, 1).squeeze(-1)) if return_lse else out

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad: Tensor, grad_lse: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        q, keys, values, segment_ids, key_segment_ids, *kept = ctx.saved_tensors
        groups, offset, scale = ctx.groups, keys.shape[1] - q.shape[1], ctx.scale
        mask = Mask(ctx.window, segment_ids, key_segment_ids)
        accumulate = torch.promote_types(q.dtype, torch.float32)
        grad_q = torch.empty_like(q)
        grad_k = torch.zeros_like(keys, dtype=accumulate)
        grad_v = torch.zeros_like(values, dtype=accumulate)
        for index, block in enumerate(_blocks(q.shape[1], keys.shape[1], ctx.window)):
            start, stop, low, high = block
            q_rows, grad_rows = _rows(q[:, start:stop], groups), _rows(grad[:, start:stop], groups)
            block_keys = keys[:, low:high]
            if kept:
                weights = kept[index]
            else:
                weights = _scores(q_rows, block_keys, block, offset, scale, mask).softmax(-1)
            grad_weights = grad_rows @ values[:, low:high].transpose(1, 2)
            grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
            if grad_lse is not None:
                rows = _rows(grad_lse[:, start:stop, :, None], groups)
                grad_scores.addcmul_(weights, rows.to(weights.dtype))
            grad_q[:, start:stop] = _unrows(
                _product(grad_scores, block_keys, scale), q[:, start:stop]
            )
            grad_k[:, low:high] += _product(grad_scores.transpose(1, 2), q_rows, scale)
            grad_v[:, low:high] += weights.transpose(1, 2) @ grad_rows
        grad_k = _ungroup(grad_k, q.shape[0]).to(keys.dtype)
        grad_v = _ungroup(grad_v, q.shape[0]).to(values.dtype)
        return grad_q, grad_k, grad_v, None, None, None, None, None


def _lse(scores: Tensor) -> Tensor:
    """`(..., 1)`, float32 (float64 for float64)."""
    return scores.to(torch.promote_types(scores.dtype, torch.float32)).logsumexp(-1, keepdim=True)


def _ungroup(x: Tensor, batch: int) -> Tensor:
    """`(B * G, S, D)` to `(B, S, G, D)`."""
    return x.view(batch, -1, *x.shape[1:]).transpose(1, 2)
