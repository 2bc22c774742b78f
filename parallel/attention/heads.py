"""Attention over ranks by trading stretches for heads: DeepSpeed-Ulysses, arXiv 2309.14509.

One all-to-all gives each rank the whole row for its share of the heads, one gives each its stretch
back for all of them. B batch, L positions a rank, P ranks, H query and G key/value heads.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from rondo.kernels import attention
from rondo.parallel.collectives import all_to_all


def attention_by_heads(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ids: Tensor | None,
    group: dist.ProcessGroup,
    window: int | None,
    scale: float,
    backend: str,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of this rank's `(B, L, H, D)` queries over the whole row; P divides H and G.

    Args:
        ids: `(P, B, L)` documents of every rank's positions, or None.
    """
    q, k, v = _whole_rows((q, k, v), group)
    if ids is not None:
        ids = ids.transpose(0, 1).flatten(1)
    found = attention(
        q,
        k,
        v,
        window=window,
        scale=scale,
        segment_ids=ids,
        return_lse=return_lse,
        backend=backend,
    )
    if isinstance(found, Tensor):
        return _own_stretch(found, group)
    o, lse = found
    return _own_stretch(o, group), _own_stretch(lse, group)


def _own_stretch(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """`(B, P * L, H / P, ...)` to `(B, L, H, ...)`."""
    stretches = x.unflatten(1, (dist.get_world_size(group), -1)).transpose(0, 1)
    return all_to_all(stretches, group).movedim(0, 2).flatten(2, 3)


def _whole_rows(tensors: tuple[Tensor, ...], group: dist.ProcessGroup) -> list[Tensor]:
    """`(B, L, H, D)` each to `(B, P * L, H / P, D)`: packed, so that they travel as one.

    Rank p gets the p-th run of heads of each tensor. Runs of query heads meet the runs of key/value
    heads that they read, for head h reads group `h // (H / G)`.
    """
    size = dist.get_world_size(group)
    runs = [x.unflatten(2, (size, -1)).flatten(3).permute(2, 0, 1, 3) for x in tensors]
    packed = all_to_all(torch.cat(runs, -1), group)
    rows = packed.transpose(0, 1).flatten(1, 2)
    parts = rows.split([run.shape[-1] for run in runs], -1)
    return [part.unflatten(2, (-1, x.shape[3])) for part, x in zip(parts, tensors, strict=True)]
