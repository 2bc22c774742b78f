"""Attention written out: every score, one softmax."""

from __future__ import annotations

import torch
from torch import Tensor

from rondo.kernels.softmax_attention.visibility import hidden_keys


def reference_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None,
    scale: float,
    segment_ids: Tensor | None,
    key_segment_ids: Tensor | None,
) -> Tensor:
    """See `attention`. Works in float32, or float64 when the inputs are."""
    return reference_attention_lse(q, k, v, window, scale, segment_ids, key_segment_ids)[0]


def reference_attention_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None,
    scale: float,
    segment_ids: Tensor | None,
    key_segment_ids: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `attention`, with the log-sum-exp."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    time, heads, keys = q.shape[1], q.shape[2], k.shape[1]
    k = k.repeat_interleave(heads // k.shape[2], dim=2).to(dtype)
    values = v.repeat_interleave(heads // v.shape[2], dim=2).to(dtype)
    scores = torch.einsum("bthd,bshd->bhts", q.to(dtype), k) * scale
    hidden = hidden_keys(
        (0, time), (0, keys), keys - time, window, segment_ids, key_segment_ids, q.device
    )
    scores = scores.masked_fill(hidden[:, None], float("-inf"))
    out = torch.einsum("bhts,bshd->bthd", scores.softmax(-1), values)
    return out.to(v.dtype), scores.logsumexp(-1).transpose(1, 2)
