"""Which keys a query may see."""

from __future__ import annotations

import torch
from torch import Tensor


def hidden_keys(
    queries: tuple[int, int],
    keys: tuple[int, int],
    offset: int,
    window: int | None,
    segment_ids: Tensor | None,
    key_segment_ids: Tensor | None,
    device: torch.device,
) -> Tensor:
    """`(B or 1, queries, keys)` bool: True where a query must not see a key.

    Args:
        queries: first and last-plus-one query of the block; query i sits at key `offset + i`.
        keys: first and last-plus-one key of the block.
    """
    at = torch.arange(*queries, device=device)[:, None] + offset
    key = torch.arange(*keys, device=device)
    hidden = key > at
    if window is not None:
        hidden = hidden | (key <= at - window)
    if segment_ids is None or key_segment_ids is None:
        return hidden[None]
    own = segment_ids[:, slice(*queries), None]
    return hidden | (own != key_segment_ids[:, None, slice(*keys)])
