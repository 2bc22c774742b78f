"""What a row does to the state of an mLSTM, without computing any output."""

from __future__ import annotations

import torch
from torch import Tensor

from rondo.kernels.linear_attention import gated_linear_attention_summary
from rondo.kernels.mlstm.stabiliser import Peaks, relative, weighted_values
from rondo.kernels.summary import LogSummary


def summarize(
    k: Tensor,
    v: Tensor,
    write: Tensor,
    forget: Tensor,
    segment_ids: Tensor | None,
    chunk_size: int,
    found: Peaks,
) -> LogSummary:
    """Arguments as for `chunked.mlstm`. The state is the one after a row that nothing precedes."""
    m = found.b
    # What is before the first token does not matter: nothing of it is in the state.
    gate, decay = relative(write, forget, m, m[:, 0], segment_ids)
    memory = gated_linear_attention_summary(
        k,
        weighted_values(v, gate),
        decay,
        segment_ids=segment_ids,
        chunk_size=chunk_size,
        backend="chunked",
    ).state
    kept = forget.sum(1)
    if segment_ids is not None:
        whole = segment_ids[:, :1] == segment_ids[:, -1:]
        kept = torch.where(whole, kept, -torch.inf)
    state = torch.cat((memory.flatten(2), m[:, -1].unsqueeze(2)), 2)
    return LogSummary(kept.unsqueeze(2), state)
