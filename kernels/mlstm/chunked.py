"""The matrix memory of xLSTM on gated linear attention: once the stabiliser is known for all
positions, the rest is a linear recurrence with gates of at most 1. n is one more column of C."""

from __future__ import annotations

import torch
from torch import Tensor

from rondo.kernels.linear_attention import gated_linear_attention
from rondo.kernels.mlstm.stabiliser import Peaks, peaks, relative, weighted_values


def mlstm(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    write: Tensor,
    forget: Tensor,
    scale: float,
    eps: float,
    first: Tensor,
    segment_ids: Tensor | None,
    chunk_size: int,
    found: Peaks | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence, by matrix products.

    Args:
        q, k, v: as for the public function.
        write: i~ `(B, T, H)`; it, `forget` and `first` have the dtype of sums.
        forget: log σ(f~) `(B, T, H)`.
        scale: factor on what is read.
        eps: added to the denominator.
        first: `(B, H, K (V + 1) + 1)`, the state before position 0.
        segment_ids: `(B, T)` or None.
        chunk_size: positions handled by one product.
        found: the stabiliser's peaks, where they are known.

    Returns:
        h `(B, T, H, V)` in the dtype of v and the state after the last position.
    """
    before = first[..., -1].detach()
    a, b = peaks(write, forget, segment_ids) if found is None else found
    m = torch.maximum(a + before.unsqueeze(1), b)
    gate, decay = relative(write, forget, m, before, segment_ids)
    memory = first[..., :-1].unflatten(-1, (k.shape[3], v.shape[3] + 1))
    o, memory = gated_linear_attention(
        q,
        k,
        weighted_values(v, gate),
        decay,
        scale=scale,
        initial_state=memory,
        segment_ids=segment_ids,
        chunk_size=chunk_size,
        backend="chunked",
    )
    wide = o.to(m.dtype)
    least = torch.maximum(wide[..., -1].abs(), torch.exp(-m)) + eps
    h = (wide[..., :-1] / least.unsqueeze(3)).to(v.dtype)
    return h, torch.cat((memory.flatten(2), m[:, -1].unsqueeze(2)), 2)
