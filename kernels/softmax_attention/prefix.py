"""Attention to keys that every query sees, joined with causal attention to the others."""

from __future__ import annotations

import torch
from torch import Tensor


def attend_prefix(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, *, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """`(o, lse)` of a softmax over the keys behind the given `o`, `lse` and over `k` besides.

    Args:
        q: `(B, T, H, D)`.
        k: `(N, G, D)` with `H % G == 0`, the same for all rows and positions.
        v: `(N, G, Dv)`.
        o: `(B, T, H, Dv)`, attention to other keys.
        lse: `(B, T, H)`, the log-sum-exp of their scores.
        scale: factor on the scores; None for `D ** -0.5`.

    Returns:
        `o` in its dtype and `lse` in its own.
    """
    groups = k.shape[1]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    grouped = q.unflatten(2, (groups, -1))
    scores = torch.einsum("btgrd,ngd->btgrn", grouped, k.to(q.dtype)).flatten(2, 3)
    scores = scores.to(lse.dtype) * scale
    total = torch.logaddexp(lse, scores.logsumexp(-1))
    weights = (scores - total[..., None]).exp().to(v.dtype).unflatten(2, (groups, -1))
    added = torch.einsum("btgrn,ngd->btgrd", weights, v).flatten(2, 3)
    return (o * (lse - total).exp()[..., None] + added).to(o.dtype), total
