"""Gated linear attention in chunks: pads, picks the form by the shape of the gate."""

from __future__ import annotations

from torch import Tensor

from rondo.kernels.linear_attention.chunks import pad_segments, pad_time
from rondo.kernels.linear_attention.head_decay import HeadDecayAttention
from rondo.kernels.linear_attention.key_decay import KeyDecayAttention, key_decay_chunk


def gated_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    segment_ids: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """The chunked form; see the package for the meaning of the arguments."""
    time = v.shape[1]
    per_key = log_decay is not None and log_decay.dim() == 4
    chunk = key_decay_chunk(chunk_size, time) if per_key else min(chunk_size, time)
    pad = -time % chunk
    q, k, v = (pad_time(x, pad) for x in (q, k, v))
    log_decay = None if log_decay is None else pad_time(log_decay, pad)
    segment_ids = pad_segments(segment_ids, pad)
    function = KeyDecayAttention if per_key else HeadDecayAttention
    o, state = function.apply(q, k, v, log_decay, initial_state, segment_ids, scale, chunk)
    return (o[:, :time] if pad else o), state
