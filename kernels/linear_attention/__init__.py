"""Gated linear attention: `S_t = exp(g_t) S_{t-1} + k_t v_t^T`, `o_t = scale · q_t^T S_t`.

Linear attention and RetNet (arXiv 2307.08621), Mamba-2 (2405.21060), GLA (2312.06635) and HGRN2
(2404.07904) are this recurrence with different gates.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from rondo.kernels.backend import choose_recurrence, full_precision, triton_refusal
from rondo.kernels.linear_attention import chunked, reference
from rondo.kernels.linear_attention.summary import summarize
from rondo.kernels.summary import DiagonalSummary, Stretch

__all__ = [
    "gated_linear_attention",
    "gated_linear_attention_stretch",
    "gated_linear_attention_summary",
]


def _triton(*arguments: Any) -> tuple[Tensor, Tensor]:
    from rondo.kernels.linear_attention import triton

    return triton.gated_linear_attention(*arguments)


def _triton_summary(*arguments: Any) -> DiagonalSummary:
    from rondo.kernels.linear_attention import triton

    return triton.summarize(*arguments)


_IMPLEMENTATIONS = {
    "chunked": chunked.gated_linear_attention,
    "reference": reference.gated_linear_attention,
    "triton": _triton,
}
_SUMMARIES = {"chunked": summarize, "triton": _triton_summary}


def gated_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    segment_ids: Tensor | None = None,
    chunk_size: int = 64,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Runs the recurrence over every row; the state restarts from zero at each new document.

    Args:
        q: `(B, T, G, K)`, cast to the dtype of v.
        k: `(B, T, G, K)`, cast to the dtype of v.
        v: `(B, T, H, V)`, H a multiple of G; head h uses group `h // (H // G)`.
        log_decay: natural log of the decay, at most 0 (-inf forgets everything): `(B, T, H)`, or
            `(B, T, H, K)` for one decay per key channel, or None for no decay. Keep it float32.
        scale: factor on the outputs, `K ** -0.5` by default.
        initial_state: `(B, H, K, V)` before position 0, of the document of position 0.
        segment_ids: `(B, T)` integers, non-decreasing in a row, one id a document.
        chunk_size: positions handled by one matmul; with a decay per key channel a multiple of
            16, of which the largest power of two below it is used. Changes rounding only.
        backend: "auto", "reference", "chunked" or "triton".

    Returns:
        o `(B, T, H, V)` in the dtype of v, and the state `(B, H, K, V)` after the last position,
        float32 (float64 for float64 inputs). Both are differentiable once in every input.

    Raises:
        ValueError: a shape, dtype, size or backend does not fit.
    """
    _check(q, k, v, log_decay, segment_ids, chunk_size)
    batch, _, heads, value_dim = v.shape
    expected = (batch, heads, k.shape[3], value_dim)
    if initial_state is not None and tuple(initial_state.shape) != expected:
        raise ValueError(
            f"initial_state has shape {tuple(initial_state.shape)}, expected (B, H, K, V) = "
            f"{expected}"
        )
    scale = _scale(q, scale)
    refusal = _refusal(k, v, log_decay, initial_state)
    run = choose_recurrence("gated_linear_attention", backend, _IMPLEMENTATIONS, v.device, refusal)
    q, k = q.to(v.dtype), k.to(v.dtype)
    with full_precision(v.device):  # sums and states must stay float32
        return run(q, k, v, log_decay, scale, initial_state, segment_ids, chunk_size)


def gated_linear_attention_summary(
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    segment_ids: Tensor | None = None,
    chunk_size: int = 64,
    backend: str = "auto",
) -> DiagonalSummary:
    """What the row does to any state: `transition * state + summary.state` is the state after it.

    Args: as for `gated_linear_attention`; there is no "reference".

    Returns:
        transition `(B, H, 1, 1)`, or `(B, H, K, 1)` for a decay per key channel, 0 where a
        document starts inside the row; state `(B, H, K, V)`, the one a zero state turns into.
        Both float32 (float64 for float64 inputs) and differentiable.

    Raises:
        ValueError: a shape, dtype, size or backend does not fit.
    """
    _check(k, k, v, log_decay, segment_ids, chunk_size)
    refusal = _refusal(k, v, log_decay, None)
    run = choose_recurrence(
        "gated_linear_attention_summary", backend, _SUMMARIES, v.device, refusal
    )
    with full_precision(v.device):
        return run(k.to(v.dtype), v, log_decay, segment_ids, chunk_size)


def gated_linear_attention_stretch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    scale: float | None = None,
    segment_ids: Tensor | None = None,
    chunk_size: int = 64,
    backend: str = "auto",
) -> Stretch | None:
    """`gated_linear_attention` begun before its initial state is known, by kernels that serve the
    summary and the outputs alike; None for a backend that has none, whose summary and outputs are
    best made apart.

    Args and Raises: as for `gated_linear_attention`.
    """
    _check(q, k, v, log_decay, segment_ids, chunk_size)
    refusal = _refusal(k, v, log_decay, None)
    run = choose_recurrence("gated_linear_attention", backend, _IMPLEMENTATIONS, v.device, refusal)
    if run is not _triton:
        return None
    from rondo.kernels.linear_attention.triton_stretch import begin_stretch

    q, k, scale = q.to(v.dtype), k.to(v.dtype), _scale(q, scale)
    return begin_stretch(q, k, v, log_decay, scale, segment_ids, chunk_size)


def _scale(q: Tensor, scale: float | None) -> float:
    if scale is None:
        return q.shape[3] ** -0.5
    if not math.isfinite(scale):
        raise ValueError(f"scale is {scale}, expected a finite number")
    return scale


def _refusal(
    k: Tensor, v: Tensor, log_decay: Tensor | None, initial_state: Tensor | None
) -> str | None:
    """Why the Triton kernels cannot serve a call, or None. (q and k are cast to the dtype of v.)"""
    if log_decay is not None and log_decay.dim() == 4 and k.shape[3] > 256:
        return f"with a decay a key channel it takes up to 256 of them, got {k.shape[3]}"
    return triton_refusal(v, log_decay, initial_state)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    segment_ids: Tensor | None,
    chunk_size: int,
) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4 or not x.is_floating_point():
            raise ValueError(
                f"{name} has shape {tuple(x.shape)} and dtype {x.dtype}, expected floating point "
                "(batch, time, heads, dim)"
            )
    if q.shape != k.shape:
        raise ValueError(f"q has shape {tuple(q.shape)}, k has {tuple(k.shape)}: expected equal")
    batch, time, heads, _ = v.shape
    groups, key_dim = k.shape[2:]
    if tuple(k.shape[:2]) != (batch, time) or time == 0:
        raise ValueError(
            f"k has (batch, time) = {tuple(k.shape[:2])}, v has {(batch, time)}: expected equal, "
            "with at least one position"
        )
    if groups == 0 or heads % groups:
        raise ValueError(f"v has {heads} heads, k has {groups}: expected a multiple")
    per_head = (batch, time, heads)
    if log_decay is not None and (
        log_decay.shape[:3] != v.shape[:3] or log_decay.shape[3:] not in ((), (key_dim,))
    ):
        raise ValueError(
            f"log_decay has shape {tuple(log_decay.shape)}, expected (B, T, H) = {per_head} or "
            f"(B, T, H, K) = {(*per_head, key_dim)}"
        )
    if segment_ids is not None and (
        tuple(segment_ids.shape) != (batch, time) or segment_ids.is_floating_point()
    ):
        raise ValueError(
            f"segment_ids has shape {tuple(segment_ids.shape)} and dtype {segment_ids.dtype}, "
            f"expected integers (B, T) = {(batch, time)}"
        )
    per_key = log_decay is not None and log_decay.dim() == 4
    if chunk_size < 1 or (per_key and chunk_size % 16):
        wanted = "a positive multiple of 16 with a decay per key channel" if per_key else "positive"
        raise ValueError(f"chunk_size is {chunk_size}, expected {wanted}")
