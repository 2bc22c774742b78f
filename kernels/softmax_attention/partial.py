"""Attention of a stretch of queries to a stretch of keys that may be only some of what they see.

Each query's softmax runs over the keys at hand, and its log-sum-exp says how much they weigh;
`merge_partial` joins the results for disjoint stretches of keys into the one for all of them
(FlashAttention, arXiv 2205.14135; ring attention, arXiv 2310.01889). Work goes by blocks of
queries, so that memory is one block of scores. Plain functions: the caller, who knows all
stretches, owns the autograd.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from rondo.kernels.softmax_attention.chunked import BLOCK, Block, Mask, _rows, _ungroup, _unrows
from rondo.kernels.softmax_attention.visibility import hidden_keys


def partial_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    query_start: int,
    key_start: int,
    window: int | None,
    segment_ids: Tensor | None,
    key_segment_ids: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Attention over the given keys alone, with the log-sum-exp of each query's scores.

    Query i, at position `query_start + i`, sees the keys j of its own document at positions
    `p_i - window < key_start + j <= p_i`; perhaps none of these.

    Args:
        q: `(B, T, H, D)`.
        k: `(B, S, G, D)` with `H % G == 0`; S may be smaller or larger than T.
        v: `(B, S, G, Dv)`.
        scale: factor on the scores.
        query_start: position of the first query.
        key_start: position of the first key.
        window: how many keys a query sees, itself included; None for all.
        segment_ids: `(B, T)` document of each query, or None.
        key_segment_ids: `(B, S)` document of each key, or None.

    Returns:
        o `(B, T, H, Dv)` and lse `(B, T, H)`, float32 (float64 for float64 inputs). A query that
        sees none of the keys has o = 0 and lse = -inf.
    """
    groups, offset = k.shape[2], query_start - key_start
    mask = Mask(window, segment_ids, key_segment_ids)
    accumulate = torch.promote_types(q.dtype, torch.float32)
    out = v.new_zeros(*q.shape[:3], v.shape[-1], dtype=accumulate)
    lse = q.new_full(q.shape[:3], float("-inf"), dtype=accumulate)
    keys, values = _rows(k, groups), _rows(v, groups)
    for block in _blocks(q.shape[1], k.shape[1], offset, window):
        start, stop, low, high = block
        queries = q[:, start:stop]
        scores = _scores(_rows(queries, groups), keys[:, low:high], block, offset, scale, mask)
        total = torch.logsumexp(scores, -1, keepdim=True)
        weights = _weights(scores, total).to(v.dtype)
        out[:, start:stop] = _unrows(_product(weights, values[:, low:high]), queries)
        lse[:, start:stop] = _unrows(total, queries).squeeze(-1)
    return out, lse


def partial_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    *,
    scale: float,
    query_start: int,
    key_start: int,
    window: int | None,
    segment_ids: Tensor | None,
    key_segment_ids: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What the given keys contribute to the gradients of attention over all keys.

    With the log-sum-exp over all keys, `P = exp(scale Q K^T - lse)` are final weights, and
    `dS = P * (dO V^T - delta)` (arXiv 2205.14135, section 3) needs no other stretch.

    Args:
        grad: `(B, T, H, Dv)`, the gradient of the final output.
        lse: `(B, T, H)`, over all keys that a query sees, not only those given.
        delta: `(B, T, H)`, the sum of `grad * o` over the last dimension, o the final output.

    The others are as in `partial_attention`.

    Returns:
        The summands of dq, dk and dv, shaped like q, k and v, in the dtype of `lse`. The first adds
        up over stretches of keys, the other two over stretches of queries.
    """
    groups, offset = k.shape[2], query_start - key_start
    mask = Mask(window, segment_ids, key_segment_ids)
    keys, values = _rows(k, groups), _rows(v, groups)
    grad_q = torch.zeros_like(q, dtype=lse.dtype)
    grad_k = torch.zeros_like(keys, dtype=lse.dtype)
    grad_v = torch.zeros_like(values, dtype=lse.dtype)
    for block in _blocks(q.shape[1], k.shape[1], offset, window):
        start, stop, low, high = block
        queries, key_rows = _rows(q[:, start:stop], groups), keys[:, low:high]
        grads = _rows(grad[:, start:stop], groups)
        scores = _scores(queries, key_rows, block, offset, scale, mask)
        weights = _weights(scores, _rows(lse[:, start:stop, :, None], groups))
        grad_scores = _product(grads, values[:, low:high].transpose(1, 2))
        grad_scores.sub_(_rows(delta[:, start:stop, :, None], groups)).mul_(weights).mul_(scale)
        grad_scores, weights = grad_scores.to(q.dtype), weights.to(v.dtype)
        grad_q[:, start:stop] = _unrows(_product(grad_scores, key_rows), q[:, start:stop])
        grad_k[:, low:high] += _product(grad_scores.transpose(1, 2), queries)
        grad_v[:, low:high] += _product(weights.transpose(1, 2), grads)
    return grad_q, _ungroup(grad_k, q.shape[0]), _ungroup(grad_v, q.shape[0])


def merge_partial(o1: Tensor, lse1: Tensor, o2: Tensor, lse2: Tensor) -> tuple[Tensor, Tensor]:
    """`(o, lse)` over two disjoint stretches of keys from the `(o, lse)` over each."""
    lse = torch.logaddexp(lse1, lse2)
    finite = _finite(lse)
    o = o1 * (lse1 - finite).exp().unsqueeze(-1) + o2 * (lse2 - finite).exp().unsqueeze(-1)
    return o, lse


def _blocks(time: int, keys: int, offset: int, window: int | None) -> Iterator[Block]:
    """The blocks of queries that see any of the keys; query i sits at key `offset + i`, which may
    lie before the first key or after the last."""
    for start in range(0, time, BLOCK):
        stop = min(start + BLOCK, time)
        low = 0 if window is None else max(0, offset + start - window + 1)
        high = min(keys, offset + stop)
        if low < high:
            yield Block(start, stop, low, high)


def _scores(q: Tensor, k: Tensor, block: Block, offset: int, scale: float, mask: Mask) -> Tensor:
    """Scores `(B * G, R * C, K)` of a block, -inf where hidden; q and k are its rows."""
    scores = _product(q, k.transpose(1, 2)).mul_(scale)
    low = block.low
    if mask.window is None and mask.segment_ids is None:
        low = max(low, offset + block.start)  # every query of the block sees the keys before it
    if low >= block.high:
        return scores
    hidden = hidden_keys(
        (block.start, block.stop),
        (low, block.high),
        offset,
        mask.window,
        mask.segment_ids,
        mask.key_segment_ids,
        q.device,
    )
    view = scores.view(hidden.shape[0], -1, hidden.shape[1], scores.shape[-1])
    view[..., low - block.low :].masked_fill_(hidden[:, None], float("-inf"))
    return scores


def _weights(scores: Tensor, lse: Tensor) -> Tensor:
    """`exp(scores - lse)`, in the place of `scores`."""
    return scores.sub_(_finite(lse)).exp_()


def _finite(lse: Tensor) -> Tensor:
    """Zero instead of -inf: what it is subtracted from is -inf as well, and `-inf + inf` is NaN."""
    return lse.masked_fill(lse == float("-inf"), 0.0)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b`, summed and returned in float32 (float64 for float64)."""
    if a.device.type == "cuda" and a.dtype in (torch.float16, torch.bfloat16):
        return torch.bmm(a, b, out_dtype=torch.float32)
    accumulate = torch.promote_types(a.dtype, torch.float32)
    return a.to(accumulate) @ b.to(accumulate)
