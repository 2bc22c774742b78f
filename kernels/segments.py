"""Where documents begin and end in a packed row. `segment_ids` is `(B, T)`, non-decreasing."""

from __future__ import annotations

import torch
from torch import Tensor


def document_starts(segment_ids: Tensor) -> Tensor:
    """`(B, T)` bool: True where a new document begins. Position 0 is False: it continues the
    document of the initial state."""
    starts = torch.zeros_like(segment_ids, dtype=torch.bool)
    starts[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    return starts


def first_document(segment_ids: Tensor) -> Tensor:
    """`(B, T)` bool: True on the document of position 0, which sees the initial state."""
    return segment_ids == segment_ids[:, :1]


def last_document(segment_ids: Tensor) -> Tensor:
    """`(B, T)` bool: True on the document of the last position, whose state is returned."""
    return segment_ids == segment_ids[:, -1:]


def document_positions(segment_ids: Tensor) -> Tensor:
    """`(B, T)` int64: distance of each token from the start of its document in this row."""
    index = torch.arange(segment_ids.shape[1], device=segment_ids.device)
    starts = torch.where(document_starts(segment_ids), index, 0)
    return index - starts.cummax(dim=1).values
