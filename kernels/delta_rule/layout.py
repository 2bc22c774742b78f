"""Chunked layout `(N, B * H, C, D)`: chunks outermost, so that one chunk of every sequence and
head is one contiguous batch of matrices, and what documents allow to pass between its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


def to_chunks(x: Tensor, chunk: int) -> Tensor:
    """`(B, T, *heads, D)` to `(N, B * H, C, D)`, contiguous; T is a multiple of `chunk`."""
    x = x.unflatten(1, (x.shape[1] // chunk, chunk)).movedim(2, -2).transpose(0, 1)
    return x.reshape(x.shape[0], -1, chunk, x.shape[-1])


def from_chunks(x: Tensor, batch: int, heads: Sequence[int]) -> Tensor:
    """`(N, B * H, C, D)` to `(B, T, *heads, D)`, contiguous."""
    x = x.unflatten(1, (batch, *heads)).transpose(0, 1).movedim(-2, 2)
    return x.flatten(1, 2).contiguous()


class Documents(NamedTuple):
    """Ones and zeros that keep packed documents apart, `(N, B * H, ., .)`."""

    incoming: Tensor  # (.., C, 1): token continues the document of the state before the chunk
    outgoing: Tensor  # (.., C, 1): token is of the document of the state after the chunk
    through: Tensor  # (.., 1, 1): both are one document


def documents(segment_ids: Tensor, chunk: int, heads: int, dtype: torch.dtype) -> Documents:
    """Who sees the states; `segment_ids` is `(B, T)`, T a multiple of `chunk`."""
    ids = _chunk_ids(segment_ids, chunk)
    before = torch.cat([ids[:1, :, :1], ids[:-1, :, -1:]])
    return Documents(
        _over_heads(ids == before, heads, dtype).unsqueeze(-1),
        _over_heads(ids == ids[..., -1:], heads, dtype).unsqueeze(-1),
        _over_heads(ids[..., -1:] == before, heads, dtype).unsqueeze(-1),
    )


def document_pairs(segment_ids: Tensor, chunk: int, heads: int, dtype: torch.dtype) -> Tensor:
    """Who sees whom in a chunk: `(N, B * H, C, C)`, 1 where the column is not after the row and of
    the same document."""
    ids = _chunk_ids(segment_ids, chunk)
    return _over_heads((ids.unsqueeze(-1) == ids.unsqueeze(-2)).tril(), heads, dtype)


def _chunk_ids(segment_ids: Tensor, chunk: int) -> Tensor:
    return segment_ids.unflatten(1, (-1, chunk)).transpose(0, 1)


def _over_heads(x: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    x = x.to(dtype)
    return x.unsqueeze(2).expand(*x.shape[:2], heads, *x.shape[2:]).flatten(1, 2)
