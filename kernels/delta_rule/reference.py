"""Gated delta rule, one token at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from rondo.kernels.segments import document_starts


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    scale: float,
    state: Tensor,
    segment_ids: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """Decay, erase and write, read; checked and defaulted arguments of `gated_delta_rule`.

    There are no chunks here: `chunk_size` is part of the common signature only.
    """
    repeats = v.shape[2] // k.shape[2]
    kind = state.dtype
    q, k = (x.to(kind).repeat_interleave(repeats, dim=2) for x in (q, k))
    values, beta = v.to(kind), beta.to(kind)
    starts = None if segment_ids is None else document_starts(segment_ids)[..., None, None, None]
    outputs = []
    for t in range(v.shape[1]):
        if starts is not None:
            state = torch.where(starts[:, t], torch.zeros_like(state), state)
        if log_decay is not None:
            decay = log_decay[:, t].to(kind).exp()
            state = state * decay.view(*decay.shape[:2], -1, 1)
        recalled = torch.einsum("bhkv,bhk->bhv", state, k[:, t])
        change = beta[:, t, :, None] * (values[:, t] - recalled)
        state = state + k[:, t, :, :, None] * change[:, :, None, :]
        outputs.append(scale * torch.einsum("bhkv,bhk->bhv", state, q[:, t]))
    return torch.stack(outputs, dim=1).to(v.dtype), state
