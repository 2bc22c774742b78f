"""Keys and values that later queries still see, from one call to the next.

A cache is part of a mixer's state: `k`, `v` `(B, S, heads, width)`, and `live` `(B, S)` bool where
documents are packed: which positions are of the document that goes on.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rondo.models.mixer import State, get


def extend(
    state: State | None, k: Tensor, v: Tensor, segment_ids: Tensor | None
) -> tuple[State, Tensor | None, Tensor | None]:
    """The cache in `state` with `k`, `v` `(B, T, heads, width)` behind it, and the ids of queries
    `(B, T)` and of keys `(B, S + T)`; both None where all is one document."""
    old_k, old_v, live = (get(state, name) for name in ("k", "v", "live"))
    if old_k is None or old_v is None:
        cache, key_ids = {"k": k, "v": v}, segment_ids
    else:
        cache = {"k": torch.cat([old_k, k], 1), "v": torch.cat([old_v, v], 1)}
        segment_ids, key_ids = _ids(segment_ids, live, k.shape[1], old_k)
    if segment_ids is not None and key_ids is not None:
        cache["live"] = key_ids == segment_ids[:, -1:]
    return cache, segment_ids, key_ids


def _ids(
    segment_ids: Tensor | None, live: Tensor | None, time: int, cached: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    if segment_ids is None and live is None:
        return None, None
    batch, before = cached.shape[:2]
    if segment_ids is None:
        segment_ids = torch.zeros(batch, time, dtype=torch.int64, device=cached.device)
    first = segment_ids[:, :1].expand(-1, before)
    # What is not of this document gets an id that no query has.
    old = first if live is None else torch.where(live, first, first - 1)
    return segment_ids, torch.cat([old, segment_ids], 1)


def trim(cache: State, window: int | None) -> State:
    """What later queries can still see; without a window, all."""
    if window is None:
        return cache
    start = max(0, cache["k"].shape[1] - (window - 1))
    return {name: value[:, start:] for name, value in cache.items()}
