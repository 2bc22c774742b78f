"""Chunked layout `(N, B * H, C, D)`: chunks outermost, so that one chunk of every sequence and
head is one contiguous batch of matrices, and what documents allow to pass between its tokens."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


def to_chunks(x: Tensor, chunk: int) -> Tensor:
    """`(B, T, *heads, D)` to `(N, B * H, C, D)`, contiguous; T is a multiple of `chunk`."""
    x = x.unflatten(1, (x.shape[1] // chunk, chunk)).movedim(2, -2).transpose(0, 1)
    return x.reshape(x.shape[0], -1, chunk, x.shape[-1])


def from_chunks(x: Tensor, batch: int, heads: tuple[int, ...]) -> Tensor:
    """`(N, B * H, C, D)` to `(B, T, *heads, D)`, contiguous."""
    x = x.unflatten(1, (batch, *heads)).transpose(0, 1).movedim(-2, 2)
    return x.flatten(1, 2).contiguous()


class Documents(NamedTuple):
    """Ones and zeros that keep packed documents apart, `(N, B * H, ., .)`."""

    pairs: Tensor  # (.., C, C): column not after row and of the same document
    incoming: Tensor  # (.., C, 1): token continues the document of the state before the chunk
    outgoing: Tensor  # (.., C, 1): token is of the document of the state after the chunk
    through: Tensor  # (.., 1, 1): both are one document


def documents(segment_ids: Tensor, chunk: int, heads: int, dtype: torch.dtype) -> Documents:
    """Masks of packed rows; `segment_ids` is `(B, T)`, T a multiple of `chunk`."""
    ids = segment_ids.unflatten(1, (-1, chunk)).transpose(0, 1)
    before = torch.cat([ids[:1, :, :1], ids[:-1, :, -1:]])
    return Documents(
        _over_heads((ids.unsqueeze(-1) == ids.unsqueeze(-2)).to(dtype).tril_(), heads),
        _over_heads((ids == before).to(dtype).unsqueeze(-1), heads),
        _over_heads((ids == ids[..., -1:]).to(dtype).unsqueeze(-1), heads),
        _over_heads((ids[..., -1:] == before).to(dtype).unsqueeze(-1), heads),
    )


def _over_heads(x: Tensor, heads: int) -> Tensor:
    return x.unsqueeze(2).expand(*x.shape[:2], heads, *x.shape[2:]).flatten(1, 2)
