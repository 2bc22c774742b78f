"""Gated linear attention, one token at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from rondo.kernels.segments import document_starts


def gated_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    segment_ids: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """The recurrence as written: `S_t = exp(g_t) S_{t-1} + k_t v_t^T`, `o_t = scale q_t^T S_t`.

    `chunk_size` has no effect here.
    """
    accumulate = torch.promote_types(v.dtype, torch.float32)
    heads = v.shape[2]
    q, k = (x.to(accumulate).repeat_interleave(heads // x.shape[2], dim=2) for x in (q, k))
    values = v.to(accumulate)
    batch, time, _, key_dim = k.shape
    if initial_state is None:
        state = values.new_zeros(batch, heads, key_dim, v.shape[3])
    else:
        state = initial_state.to(accumulate)
    decay = None
    if log_decay is not None:
        decay = log_decay.to(accumulate).exp().reshape(batch, time, heads, -1, 1)
    starts = None if segment_ids is None else document_starts(segment_ids)
    outputs = []
    for t in range(time):
        if starts is not None:
            state = torch.where(starts[:, t, None, None, None], 0.0, state)
        if decay is not None:
            state = decay[:, t] * state
        state = state + k[:, t].unsqueeze(-1) * values[:, t].unsqueeze(-2)
        outputs.append(scale * torch.einsum("bhk,bhkv->bhv", q[:, t], state))
    return torch.stack(outputs, dim=1).to(v.dtype), state
