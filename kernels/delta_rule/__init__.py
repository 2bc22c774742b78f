"""The gated delta rule: a linear recurrence that can take back what it has written.

Sources: DeltaNet (arXiv 2406.06484), Gated DeltaNet (arXiv 2412.06464), beta up to 2 (arXiv
2411.12537), decay per key channel as in KDA (arXiv 2510.26692).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rondo.kernels.backend import choose_recurrence, triton_refusal
from rondo.kernels.delta_rule.chunked import chunked, chunked_summary
from rondo.kernels.delta_rule.reference import reference
from rondo.kernels.summary import MatrixSummary, Stretch

TRITON_KEYS = 256
"""The most key channels of a head that the Triton kernels hold in registers."""


def _triton(*arguments: Any) -> tuple[Tensor, Tensor]:
    from rondo.kernels.delta_rule import triton

    return triton.gated_delta_rule(*arguments)


def _triton_summary(*arguments: Any) -> MatrixSummary:
    from rondo.kernels.delta_rule import triton

    return triton.summary(*arguments)


_IMPLEMENTATIONS = {"chunked": chunked, "reference": reference, "triton": _triton}
_SUMMARIES = {"chunked": chunked_summary, "triton": _triton_summary}


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None = None,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    segment_ids: Tensor | None = None,
    chunk_size: int = 64,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Decay, erase and write, read: for every token t, in this order,

        S <- diag(exp(g_t)) S;   S <- S + beta_t k_t (v_t - S^T k_t)^T;   o_t = scale * S^T q_t

    Differentiable once in every floating point input. Computes in the dtype of `v`, with gates,
    sums and states in float32 (float64 when `v` is).

    Args:
        q, k: `(B, T, G, K)` with H a multiple of G; head h uses group `h // (H // G)`. Keys are
            used as given: normalise them before, the recurrence grows when `beta |k|^2 > 2`.
        v: `(B, T, H, V)`.
        beta: `(B, T, H)`, how much of the old value is replaced: in [0, 2], 2 is a reflection.
        log_decay: g, natural logarithm of the decay, at most 0: `(B, T, H)`, `(B, T, H, K)` or
            None for no decay.
        scale: of the output; default `K ** -0.5`.
        initial_state: `(B, H, K, V)`, the state before position 0; default zeros.
        segment_ids: `(B, T)` integer, non-decreasing in a row: a new id resets the state.
        chunk_size: tokens handled as one block of matrix products by the chunked backend, a power
            of two; changes results only within rounding.
        backend: see `kernels.backend.choose`.

    Returns:
        o `(B, T, H, V)` in the dtype of `v`, and the state after the last position
        `(B, H, K, V)` in float32 or float64.

    Raises:
        ValueError: a shape, dtype or option does not fit.
    """
    _check(k, v, beta, log_decay, segment_ids, chunk_size)
    _expect("q", q, tuple(k.shape))
    shape = (v.shape[0], v.shape[2], k.shape[3], v.shape[3])
    kind = torch.float64 if v.dtype == torch.float64 else torch.float32
    if initial_state is None:
        state = torch.zeros(shape, dtype=kind, device=v.device)
    else:
        _expect("initial_state", initial_state, shape)
        state = initial_state.to(kind)
    refusal = _refusal(k, q, v, beta, log_decay)
    run = choose_recurrence("gated_delta_rule", backend, _IMPLEMENTATIONS, v.device, refusal)
    scale = k.shape[3] ** -0.5 if scale is None else scale
    return run(q, k, v, beta, log_decay, scale, state, segment_ids, chunk_size)


def gated_delta_rule_summary(
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None = None,
    *,
    segment_ids: Tensor | None = None,
    chunk_size: int = 64,
    backend: str = "auto",
) -> MatrixSummary:
    """What the whole row does to a state: `S_out = transition @ S_in + state`.

    Arguments as for `gated_delta_rule`; differentiable like it.

    Returns:
        transition `(B, H, K, K)` and state `(B, H, K, V)`, in float32 (float64 when `v` is). The
        transition is zero where a document starts inside the row, and has no singular value above
        1 when `|k| = 1` and beta is in [0, 2].

    Raises:
        ValueError: a shape, dtype or option does not fit.
    """
    _check(k, v, beta, log_decay, segment_ids, chunk_size)
    refusal = _refusal(k, v, beta, log_decay)
    run = choose_recurrence("gated_delta_rule_summary", backend, _SUMMARIES, v.device, refusal)
    return run(k, v, beta, log_decay, segment_ids, chunk_size)


def gated_delta_rule_stretch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None = None,
    *,
    scale: float | None = None,
    segment_ids: Tensor | None = None,
    chunk_size: int = 64,
    backend: str = "auto",
) -> Stretch | None:
    """`gated_delta_rule` begun before its initial state is known, by kernels whose chunks serve
    the summary and the outputs alike; None for a backend that has none, whose summary and outputs
    are best made apart.

    Arguments and errors as for `gated_delta_rule`.
    """
    _check(k, v, beta, log_decay, segment_ids, chunk_size)
    _expect("q", q, tuple(k.shape))
    refusal = _refusal(k, q, v, beta, log_decay)
    run = choose_recurrence("gated_delta_rule", backend, _IMPLEMENTATIONS, v.device, refusal)
    if run is not _triton:
        return None
    from rondo.kernels.delta_rule.triton_stretch import begin_stretch

    scale = k.shape[3] ** -0.5 if scale is None else scale
    return begin_stretch(q, k, v, beta, log_decay, scale, segment_ids, chunk_size)


def _refusal(k: Tensor, *others: Tensor | None) -> str | None:
    """Why the Triton kernels cannot run, or None."""
    if not 1 <= k.shape[3] <= TRITON_KEYS:
        return f"it takes keys of 1 to {TRITON_KEYS} numbers, got {k.shape[3]}"
    return triton_refusal(k, *others)


def _check(
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    segment_ids: Tensor | None,
    chunk_size: int,
) -> None:
    if v.dim() != 4 or v.shape[1] == 0:
        raise ValueError(f"v must be (B, T, H, V) with T >= 1, got {tuple(v.shape)}")
    batch, time, heads, _ = v.shape
    if not v.is_floating_point():
        raise ValueError(f"v must be of a floating point dtype, got {v.dtype}")
    if k.dim() != 4 or k.shape[:2] != v.shape[:2]:
        raise ValueError(f"k must be ({batch}, {time}, G, K) to fit v, got {tuple(k.shape)}")
    if k.shape[2] == 0 or heads % k.shape[2] != 0:
        raise ValueError(
            f"the {heads} heads of v must be a multiple of the heads of k, got {k.shape[2]}"
        )
    _expect("beta", beta, (batch, time, heads))
    if log_decay is not None:
        per_key = (batch, time, heads, k.shape[3])
        _expect("log_decay", log_decay, per_key if log_decay.dim() == 4 else per_key[:3])
    if segment_ids is not None:
        _expect("segment_ids", segment_ids, (batch, time))
        if segment_ids.is_floating_point():
            raise ValueError(f"segment_ids must be integers, got {segment_ids.dtype}")
    if chunk_size < 1 or chunk_size & (chunk_size - 1):
        raise ValueError(f"chunk_size must be a power of two, got {chunk_size}")


def _expect(name: str, x: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(x.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(x.shape)}")
