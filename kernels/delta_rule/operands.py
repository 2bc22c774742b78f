"""From the arguments of the operator to what the matrix products of its chunks work on."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rondo.kernels.delta_rule.gates import HeadGates, pair_factors, scaled
from rondo.kernels.delta_rule.key_gates import KeyGates
from rondo.kernels.delta_rule.layout import document_pairs, documents, to_chunks


class Operands(NamedTuple):
    """Chunked inputs of the matrix products, all `(Y, C, .)`."""

    readers: list[Tensor]  # the scaled queries unless there are none, then -beta k
    keys: Tensor
    beta: Tensor  # (.., 1)
    from_start: list[Tensor]  # readers as they see the state before the chunk
    to_end: Tensor  # keys as they write to the state after the chunk
    through: Tensor | None  # decay of the state over the chunk, None for none


def _chunked_decay(log_decay: Tensor | None, chunk: int) -> Tensor | None:
    if log_decay is None:
        return None
    return to_chunks(log_decay if log_decay.dim() == 4 else log_decay.unsqueeze(-1), chunk)


def make_pairs(
    log_decay: Tensor | None, segment_ids: Tensor | None, chunk: int, v: Tensor
) -> Tensor | None:
    """The `pairs` of the gates, the part of them that is worth keeping for the backward pass."""
    same = None
    if segment_ids is not None:
        same = document_pairs(segment_ids, chunk, v.shape[2], v.dtype)
    decay = _chunked_decay(log_decay, chunk)
    if decay is not None and decay.shape[-1] > 1:
        return same
    return pair_factors(decay, same, v.dtype)


def make_gates(
    log_decay: Tensor | None,
    segment_ids: Tensor | None,
    pairs: Tensor | None,
    chunk: int,
    v: Tensor,
) -> HeadGates | KeyGates:
    """Gates for `v` in chunks; `pairs` from `make_pairs`."""
    docs = None
    if segment_ids is not None:
        docs = documents(segment_ids, chunk, v.shape[2], v.dtype)
    decay = _chunked_decay(log_decay, chunk)
    if decay is not None and decay.shape[-1] > 1:
        return KeyGates(decay, docs, pairs, v.dtype)
    return HeadGates(decay, docs, pairs, v.dtype)


def make_operands(
    q: Tensor | None,
    k: Tensor,
    beta: Tensor,
    gates: HeadGates | KeyGates,
    scale: float,
    chunk: int,
    dtype: torch.dtype,
) -> Operands:
    """Chunks of q (unless None), k and beta in `dtype`; q and k are `(B, T, G, H / G, K)`."""
    keys, beta = to_chunks(k.to(dtype), chunk), to_chunks(beta.to(dtype).unsqueeze(-1), chunk)
    readers = [keys * -beta]
    if q is not None:
        readers.insert(0, to_chunks(q.to(dtype), chunk) * scale)
    return Operands(
        readers,
        keys,
        beta,
        [scaled(r, gates.from_start) for r in readers],
        scaled(keys, gates.to_end),
        gates.through,
    )
