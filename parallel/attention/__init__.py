"""Attention over sequences that are cut into one stretch a rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rondo.kernels import attention
from rondo.kernels.backend import choose
from rondo.kernels.softmax_attention import check_inputs
from rondo.parallel.attention.heads import attention_by_heads
from rondo.parallel.attention.ring import ring_attention
from rondo.parallel.collectives import gather

__all__ = ["attention_over_ranks"]


def attention_over_ranks(group: dist.ProcessGroup) -> Callable[..., Any]:
    """The sequence-parallel form of `kernels.attention`: same signature; each rank of `group` holds
    a contiguous, equally long stretch of every row, in rank order.

    Where the ranks divide the query heads and the key/value heads, they trade stretches for heads
    (DeepSpeed-Ulysses, arXiv 2309.14509); else keys and values travel from rank to rank (ring
    attention, arXiv 2310.01889). Both equal attention over the whole row, gradients included.

    The callable takes q `(B, L, H, D)`, k `(B, L, G, D)`, v `(B, L, G, Dv)` and `segment_ids`
    `(B, L)` of this rank's positions `[r L, (r + 1) L)`, ids being those of the whole row (within
    int32), and returns this rank's `(B, L, H, Dv)`, with `return_lse` also `(B, L, H)`. Every rank
    must call it alike.

    Raises (the callable):
        ValueError: as `kernels.attention`; there are more keys than queries (a cache); the ring is
            asked for a backend other than "auto" and "chunked".
    """
    size = dist.get_world_size(group)
    if size == 1:
        return attention

    @torch.compiler.disable  # transfers cannot be traced: one graph break, not one each
    def attend(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        window: int | None = None,
        scale: float | None = None,
        segment_ids: Tensor | None = None,
        key_segment_ids: Tensor | None = None,
        return_lse: bool = False,
        backend: str = "auto",
    ) -> Tensor | tuple[Tensor, Tensor]:
        check_inputs(q, k, v, window, segment_ids, key_segment_ids)
        time, heads, groups = q.shape[1], q.shape[2], k.shape[2]
        if k.shape[1] != time:
            raise ValueError(
                f"attention: {k.shape[1]} keys for {time} queries: a key/value cache cannot be "
                f"carried over {size} sequence-parallel ranks"
            )
        ids = None if segment_ids is None else gather(segment_ids.int(), group)
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        if heads % size == 0 and groups % size == 0:
            return attention_by_heads(q, k, v, ids, group, window, scale, backend, return_lse)
        name = (
            f"attention over a ring of {size} ranks (which do not divide {heads} query and "
            f"{groups} key/value heads)"
        )
        run = choose(name, backend, {"chunked": ring_attention}, q.device)
        o, lse = run(q, k, v, ids, group, window, scale)
        return (o, lse) if return_lse else o

    return attend
