"""The linear scan, one position at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from rondo.kernels.segments import document_starts


def linear_scan(
    a: Tensor, b: Tensor, initial_state: Tensor | None, segment_ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`h_t = a_t * h_{t-1} + b_t` as written."""
    accumulate = torch.promote_types(b.dtype, torch.float32)
    a, inputs = a.to(accumulate), b.to(accumulate)
    if initial_state is None:
        state = torch.zeros_like(inputs[:, 0])
    else:
        state = initial_state.to(accumulate)
    starts = None if segment_ids is None else document_starts(segment_ids)
    states = []
    for t in range(b.shape[1]):
        if starts is not None:
            start = starts[:, t].reshape(-1, *(1 for _ in state.shape[1:]))
            state = torch.where(start, 0.0, state)
        state = a[:, t] * state + inputs[:, t]
        states.append(state)
    return torch.stack(states, dim=1).to(b.dtype), state
