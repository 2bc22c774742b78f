"""The matrix memory of xLSTM, one token at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from rondo.kernels.segments import document_starts


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
) -> tuple[Tensor, Tensor]:
    """Arguments and results as for `chunked.mlstm`; `chunk_size` has no effect here."""
    heads, key_dim, value_dim = v.shape[2], k.shape[3], v.shape[3]
    q, k = (x.to(first.dtype).repeat_interleave(heads // x.shape[2], dim=2) for x in (q, k))
    values = v.to(first.dtype)
    memory = first[..., :-1].unflatten(-1, (key_dim, value_dim + 1))
    c, n, m = memory[..., :-1], memory[..., -1], first[..., -1].detach()
    starts = None if segment_ids is None else document_starts(segment_ids)
    outputs = []
    for t in range(v.shape[1]):
        if starts is not None:
            new = starts[:, t, None]
            m = torch.where(new, 0.0, m)
            n = torch.where(new[..., None], 0.0, n)
            c = torch.where(new[..., None, None], 0.0, c)
        peak = torch.maximum(forget[:, t] + m, write[:, t]).detach()
        i = torch.exp(write[:, t] - peak)[..., None]
        f = torch.exp(forget[:, t] + m - peak)[..., None]
        m = peak
        n = f * n + i * k[:, t]
        c = f[..., None] * c + (i * k[:, t])[..., None] * values[:, t, :, None, :]
        read = scale * torch.einsum("bhk,bhkv->bhv", q[:, t], c)
        weight = scale * (q[:, t] * n).sum(-1)
        outputs.append(read / (torch.maximum(weight.abs(), torch.exp(-m)) + eps)[..., None])
    memory = torch.cat((c, n[..., None]), -1).flatten(-2)
    return torch.stack(outputs, 1).to(v.dtype), torch.cat((memory, m[..., None]), -1)
