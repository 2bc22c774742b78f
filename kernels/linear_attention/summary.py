"""What a row does to the state of gated linear attention, without computing any output."""

from __future__ import annotations

import torch
from torch import Tensor

from rondo.kernels.linear_attention.chunks import pad_segments, pad_time, sums_after
from rondo.kernels.segments import last_document
from rondo.kernels.summary import DiagonalSummary


def summarize(
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    segment_ids: Tensor | None,
    chunk_size: int,
) -> DiagonalSummary:
    """`exp(sum g)` and `sum_t exp(sum_{r>t} g_r) k_t v_t^T`, differentiable by autograd."""
    accumulate = torch.promote_types(v.dtype, torch.float32)
    batch, time, heads, _ = v.shape
    groups = k.shape[2]
    chunk = min(chunk_size, time)
    pad = -time % chunk
    k, v = pad_time(k, pad), pad_time(v, pad)
    log_decay = None if log_decay is None else pad_time(log_decay, pad)
    segment_ids = pad_segments(segment_ids, pad)
    k, v = (x.unflatten(1, (-1, chunk)).unflatten(3, (groups, -1)) for x in (k, v))
    transition = torch.ones(batch, heads, 1, 1, dtype=accumulate, device=v.device)
    factor = None
    if log_decay is not None:
        steps = log_decay.to(accumulate).reshape(batch, time + pad, heads, -1)
        steps = steps.unflatten(1, (-1, chunk))
        totals = steps.sum(2, keepdim=True)
        factor = (sums_after(steps, 2) + sums_after(totals, 1)).exp()
        transition = totals.sum((1, 2)).exp().unsqueeze(-1)
    if segment_ids is not None:
        visible = last_document(segment_ids).view(batch, -1, chunk, 1, 1)
        factor = visible.to(accumulate) if factor is None else torch.where(visible, factor, 0.0)
        whole = segment_ids[:, 0] == segment_ids[:, -1]
        transition = torch.where(whole.view(-1, 1, 1, 1), transition, 0.0)
    if factor is not None and factor.shape[-1] > 1:
        factor = factor.to(k.dtype).unflatten(3, (groups, -1))
        written = torch.einsum("bncgrk,bncgrv->bngrkv", k * factor, v)
    else:
        if factor is not None:
            v = v * factor.to(v.dtype).expand(-1, -1, -1, heads, -1).unflatten(3, (groups, -1))
        written = torch.einsum("bncgk,bncgrv->bngrkv", k.squeeze(4), v)
    state = written.to(accumulate).sum(1).flatten(1, 2)
    return DiagonalSummary(transition, state)
