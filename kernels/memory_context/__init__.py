"""Memory as context: what a neural memory recalls joins the attention of a segment, and the memory
learns from what that attention finds (MAC, arXiv 2501.00663, section 4.1).

A document is cut into segments of `segment_size` tokens. For token t of the segment that starts
at s, per head, with M the weights of a memory as in `kernels.neural_memory`:

    h_t = M_s(r_t)                                    recalled with the memory before the segment
    y_t = softmax attention of q_t to the keys behind (o_t, lse_t) and to
          k_j = sqrt(D) W_k h_j / |W_k h_j|,  v_j = W_v h_j     for s <= j <= t
    M takes a step on u(SiLU(W_K y_t)) -> SiLU(W_V y_t), u making unit norm
    m_t = M_t(u(SiLU(W_Q y_t)))

`o`, `lse` are attention to whatever else a token sees: its segment and persistent tokens. All
projections are of single heads, so that heads know nothing of each other.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from rondo.kernels.backend import choose, full_precision
from rondo.kernels.memory_context.segments import pieces
from rondo.kernels.memory_context.walk import ContextState, Walk, Weights, pack, unpack
from rondo.kernels.neural_memory import fresh_memory

__all__ = ["ContextOutput", "ContextState", "fresh_context", "memory_context"]


_BACKENDS = ("chunked", "reference")
_NO_KERNEL = (
    "no Triton kernel is written for attention to what a memory recalls; 'auto' takes those of the "
    "operators inside that have one"
)


class ContextOutput(NamedTuple):
    """What `memory_context` returns."""

    o: Tensor
    """`(B, T, H, 2 D)` in the dtype of o: y and m side by side."""
    state: ContextState
    """After the last token."""
    limited: Tensor
    """`(B, H)` int64: how often a limit of the memory acted."""


@torch.compiler.disable  # pieces are of many lengths: one graph break, not a graph for each
def memory_context(
    q: Tensor,
    o: Tensor,
    lse: Tensor,
    r: Tensor,
    learning_rate: Tensor,
    log_momentum: Tensor,
    log_decay: Tensor,
    recalled: Weights,
    learned: Weights,
    weights: Weights,
    *,
    segment_size: int,
    chunk_size: int = 16,
    residual: bool = True,
    max_update: float = 10.0,
    max_weight: float = 100.0,
    initial_state: ContextState | None = None,
    segment_ids: Tensor | None = None,
    backend: str = "auto",
) -> ContextOutput:
    """Runs attention with recalled keys, and the memory behind it, over every row.

    Args:
        q, r: `(B, T, H, D)`: queries of attention and of the memory; r of unit norm.
        o, lse: `(B, T, H, D)` and `(B, T, H)`: attention of q to other keys, with its log-sum-exp.
        learning_rate, log_momentum, log_decay: `(B, T, H)`, as in `neural_memory`.
        recalled: `(H, D, D)` each, `(out, in)`: W_k, W_v.
        learned: `(H, D, D)` each: W_Q, W_K, W_V.
        weights: the memory of a new document, as in `neural_memory`; D into D.
        segment_size: tokens of a segment, a multiple of chunk_size. Part of the model.
        chunk_size, residual, max_update, max_weight: as in `neural_memory`.
        initial_state: of the document of position 0.
        segment_ids: `(B, T)` integers, non-decreasing in a row, one id a document.
        backend: of the operators inside, "auto", "reference" (one token at a time) or "chunked".

    Raises:
        ValueError: a shape, size or backend does not fit.
    """
    _check(q, o, lse, r, recalled, learned, segment_size, chunk_size)
    if backend != "auto":  # which the operators inside make something of, each for itself
        choose("memory_context", backend, dict.fromkeys(_BACKENDS, Walk), q.device, _NO_KERNEL)
    tensors = (q, o, lse, r, learning_rate, log_momentum, log_decay)
    fresh = fresh_context(*tensors, recalled, learned, weights, segment_size=segment_size)
    options = {
        "residual": residual,
        "max_update": max_update,
        "max_weight": max_weight,
        "chunk_size": chunk_size,
    }
    walk = Walk(recalled, learned, weights, segment_size, options, backend)
    longest = 1 if backend == "reference" else segment_size
    count = None if initial_state is None else initial_state.count
    plan = pieces(q.shape[:2], segment_size, longest, segment_ids, count, q.device)
    first = unpack(fresh, q, weights, segment_size, chunk_size)
    now, outputs = first, []
    limited = torch.zeros(q.shape[0], q.shape[2], dtype=torch.int64, device=q.device)
    if initial_state is not None:
        now = unpack(initial_state, q, weights, segment_size, chunk_size)
    with full_precision(q.device):  # a memory's steps are small
        for piece in plan:
            part = slice(piece.start, piece.stop)
            found, now, more = walk(piece, [x[:, part] for x in tensors], now, first)
            outputs.append(found)
            limited = limited + more
    return ContextOutput(torch.cat(outputs, 1), pack(now), limited)


def fresh_context(*tensors: Any, segment_size: int, **options: Any) -> ContextState:
    """The state before a document, from the operator's own tensors and options."""
    q, weights = tensors[0], tensors[-1]
    memory = fresh_memory(q, q, q, weights)
    batch, _, heads, dim = q.shape
    start = memory.values[:, :, 1]
    keys = start.new_zeros(batch, heads, 2 * (segment_size - 1) * dim)
    return ContextState(torch.cat([memory.values.flatten(2), start, keys], -1), memory.done)


def _check(
    q: Tensor,
    o: Tensor,
    lse: Tensor,
    r: Tensor,
    recalled: Weights,
    learned: Weights,
    segment_size: int,
    chunk_size: int,
) -> None:
    if q.dim() != 4 or q.shape[1] == 0:
        raise ValueError(f"q has shape {tuple(q.shape)}, expected (B, T, H, D) with T > 0")
    for name, x, shape in (("o", o, q.shape), ("r", r, q.shape), ("lse", lse, q.shape[:3])):
        if x.shape != shape:
            raise ValueError(f"{name} has shape {tuple(x.shape)}, expected {tuple(shape)}")
    heads, dim = q.shape[2:]
    for name, count, found in (("recalled", 2, recalled), ("learned", 3, learned)):
        if [tuple(w.shape) for w in found] != [(heads, dim, dim)] * count:
            raise ValueError(
                f"{name} has shapes {[tuple(w.shape) for w in found]}, expected {count} of "
                f"(H, D, D) = {(heads, dim, dim)}"
            )
    if segment_size < 1 or chunk_size < 1 or segment_size % chunk_size:
        raise ValueError(
            f"segment_size is {segment_size}, expected a multiple of chunk_size {chunk_size}"
        )
