"""Chunked layout `(Y, C, D)`, Y = N B H: of every sequence and head one chunk, then all the next
ones, so that a chunk of all of them is one contiguous batch of matrices; and what documents allow
to pass between its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


def to_chunks(x: Tensor, chunk: int) -> Tensor:
    """`(B, T, *heads, D)` to `(Y, C, D)`, contiguous; T is a multiple of `chunk`."""
    batch, time, *heads, width = x.shape
    x = x.view(batch, time // chunk, chunk, *heads, width)
    order = (1, 0, *range(3, x.dim() - 1), 2, x.dim() - 1)
    return x.permute(order).reshape(-1, chunk, width)


def from_chunks(x: Tensor, batch: int, heads: Sequence[int]) -> Tensor:
    """`(Y, C, D)` to `(B, T, *heads, D)`, contiguous."""
    chunk, width = x.shape[1:]
    x = x.view(-1, batch, *heads, chunk, width)
    order = (1, 0, x.dim() - 2, *range(2, x.dim() - 2), x.dim() - 1)
    return x.permute(order).reshape(batch, -1, *heads, width)


class Documents(NamedTuple):
    """Ones and zeros that keep packed documents apart."""

    incoming: Tensor  # (Y, C, 1): token continues the document of the state before the chunk
    outgoing: Tensor  # (Y, C, 1): token is of the document of the state after the chunk
    through: Tensor  # (Y, 1, 1): both are one document


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
    """Who sees whom in a chunk: `(Y, C, C)`, 1 where the column is not after the row and of
    the same document."""
    ids = _chunk_ids(segment_ids, chunk)
    return _over_heads((ids.unsqueeze(-1) == ids.unsqueeze(-2)).tril(), heads, dtype)


def _chunk_ids(segment_ids: Tensor, chunk: int) -> Tensor:
    return segment_ids.unflatten(1, (-1, chunk)).transpose(0, 1)


def _over_heads(x: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    x = x.to(dtype)
    return x.unsqueeze(2).expand(*x.shape[:2], heads, *x.shape[2:]).flatten(0, 2)
