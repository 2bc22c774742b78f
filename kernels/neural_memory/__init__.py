"""Titans' neural memory: an MLP per head that learns while it reads (arXiv 2501.00663).

For every token, with M the weights, k and q of unit norm, and `loss = ||M(k) - v||²`:

    S_t = η_t S_{t-1} - θ_t ∇loss(M_chunk; k_t, v_t)      momentum
    M_t = (1 - α_t) M_{t-1} + S_t                          forgetting
    o_t = M_t(q_t)

M_chunk are the weights where the token's chunk begins. A chunk is `chunk_size` tokens, counted from
the start of a document; its size is part of the model, not of the way it is computed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from rondo.kernels.backend import choose, full_precision, triton_refusal
from rondo.kernels.neural_memory import chunked, reference
from rondo.kernels.neural_memory.layers import Limits, join, sizes, split
from rondo.kernels.tiles import values_are_known

__all__ = ["MemoryOutput", "MemoryState", "fresh_memory", "neural_memory"]


def _triton(*arguments: Any) -> Any:
    from rondo.kernels.neural_memory import triton

    return triton.neural_memory(*arguments)


_IMPLEMENTATIONS = {
    "chunked": chunked.neural_memory,
    "reference": reference.neural_memory,
    "triton": _triton,
}


class MemoryState(NamedTuple):
    """What a memory hands on, at any token; nothing of the tokens themselves is kept."""

    values: Tensor
    """`(B, H, 3, P)`, float32 (float64 for float64 inputs): weights at the start of the open
    chunk, weights, momentum; P numbers, the matrices one after another."""
    done: Tensor
    """`(B,)` int64: tokens of the open chunk so far, `chunk_size` when it is complete; 0 only
    before a document's first token."""


class MemoryOutput(NamedTuple):
    """What `neural_memory` returns."""

    o: Tensor
    """`(B, T, H, D)` in the dtype of v."""
    state: MemoryState
    """After the last token."""
    limited: Tensor
    """`(B, H)` int64: how often a limit acted."""


def neural_memory(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    learning_rate: Tensor,
    log_momentum: Tensor,
    log_decay: Tensor,
    weights: tuple[Tensor, ...],
    *,
    residual: bool = True,
    max_update: float = 10.0,
    max_weight: float = 100.0,
    max_gradient: float = 1e10,
    initial_state: MemoryState | None = None,
    segment_ids: Tensor | None = None,
    chunk_size: int = 16,
    at_border: bool = False,
    backend: str = "auto",
) -> MemoryOutput:
    """Runs the memory over every row; it restarts from `weights` at each new document.

    Args:
        q, k, v: `(B, T, H, D)`; q and k of about unit norm.
        learning_rate: θ `(B, T, H)`, at least 0.
        log_momentum: ln η `(B, T, H)`, at most 0; -inf: none.
        log_decay: ln(1 - α) `(B, T, H)`, at most 0; -inf: forget all.
        weights: the memory of a new document, one matrix `(H, out, in)` a layer; the first takes
            D and the last gives D. SiLU between layers (smooth, as the second derivative needs).
        residual: `M(x) = x + W_L silu(... W_1 x)` instead of without x.
        max_update: limit of the Frobenius norm of a token's gradient of a matrix, before θ.
        max_weight: limit of the Frobenius norm of a matrix and of its momentum where a chunk
            begins. The initial weights are taken as they are.
        max_gradient: limit of the entries of the gradient of a matrix, and of its momentum, that a
            chunk hands to the one before it in the backward pass; a larger gradient is scaled
            down. The limits above bound the memory, not how gradients grow over chunks.
        initial_state: of the document of position 0.
        segment_ids: `(B, T)` integers, non-decreasing in a row, one id a document.
        chunk_size: tokens whose gradients are taken at the same weights.
        at_border: no row's initial state has an open chunk that is not complete, which saves work.
        backend: "auto", "reference", "chunked" or "triton".

    Returns:
        Outputs, the state after the last position, and how often a limit acted. All computed in
        float32 (float64 for float64 inputs); differentiable in every floating-point input,
        through the gradients that the memory learns by.

    Raises:
        ValueError: a shape, size or backend does not fit.
    """
    gates = learning_rate, log_momentum, log_decay
    _check(q, k, v, gates, weights, chunk_size, segment_ids)
    kind = torch.promote_types(v.dtype, torch.float32)
    batch, heads = v.shape[0], v.shape[2]
    initial = [w.to(kind).expand(batch, *w.shape) for w in weights]
    if initial_state is None:
        values, done = _fresh_values(initial), None
    else:
        values, done = initial_state
    expected = (batch, heads, 3, sizes(weights))
    if tuple(values.shape) != expected:
        raise ValueError(
            f"initial_state.values has shape {tuple(values.shape)}, expected "
            f"(B, H, 3, P) = {expected}"
        )
    if done is not None and values_are_known(done) and done.max() > chunk_size:
        raise ValueError(
            f"initial_state.done has {int(done.max())} tokens of a chunk: the state was made with "
            f"another chunk_size than {chunk_size}"
        )
    refusal = triton_refusal(q, k, v, *gates, *weights, values)
    run = choose("neural_memory", backend, _IMPLEMENTATIONS, v.device, refusal)
    with full_precision(v.device):  # a memory's steps are small
        tokens = [x.to(kind) for x in (q, k, v, learning_rate, log_momentum, log_decay)]
        memory = [split(x, weights) for x in values.to(kind).unbind(2)]
        o, memory, done, limited = run(
            tokens,
            initial,
            memory,
            done,
            segment_ids,
            Limits(max_update, max_weight, max_gradient),
            residual,
            chunk_size,
            at_border,
        )
        values = torch.stack([join(x) for x in memory], 2)
    return MemoryOutput(o.to(v.dtype), MemoryState(values, done), limited)


def fresh_memory(*tensors: Any, **options: Any) -> MemoryState:
    """The state before a document, from the operator's own tensors and options."""
    v, weights = tensors[2], tensors[-1]
    kind = torch.promote_types(v.dtype, torch.float32)
    values = _fresh_values([w.to(kind).expand(len(v), *w.shape) for w in weights])
    return MemoryState(values, torch.zeros(len(v), dtype=torch.int64, device=v.device))


def _fresh_values(initial: list[Tensor]) -> Tensor:
    flat = join(initial)
    return torch.stack([flat, flat, torch.zeros_like(flat)], 2)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: tuple[Tensor, ...],
    weights: tuple[Tensor, ...],
    chunk_size: int,
    segment_ids: Tensor | None,
) -> None:
    if v.dim() != 4 or v.shape[1] == 0:
        raise ValueError(f"v has shape {tuple(v.shape)}, expected (B, T, H, D) with T > 0")
    for name, x in (("q", q), ("k", k)):
        if x.shape != v.shape:
            raise ValueError(f"{name} has shape {tuple(x.shape)}, v has {tuple(v.shape)}")
    for name, x in zip(("learning_rate", "log_momentum", "log_decay"), gates, strict=True):
        if x.shape != v.shape[:3]:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}, expected (B, T, H) = {tuple(v.shape[:3])}"
            )
    heads, dim = v.shape[2:]
    widths = [dim, *(w.shape[1] if w.dim() == 3 else -1 for w in weights)]
    expected = [(heads, out, into) for into, out in zip(widths, [*widths[1:-1], dim], strict=False)]
    if not weights or [tuple(w.shape) for w in weights] != expected:
        raise ValueError(
            f"weights have shapes {[tuple(w.shape) for w in weights]}, expected matrices "
            f"(H, out, in) that follow each other from D = {dim} to {dim}, for H = {heads}"
        )
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}, expected at least 1")
    if segment_ids is not None and (
        segment_ids.shape != v.shape[:2] or segment_ids.is_floating_point()
    ):
        raise ValueError(
            f"segment_ids has shape {tuple(segment_ids.shape)} and dtype {segment_ids.dtype}, "
            f"expected integers (B, T) = {tuple(v.shape[:2])}"
        )
