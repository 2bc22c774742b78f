"""xLSTM's matrix memory (arXiv 2405.04517): gated linear attention with an exponential input gate,
a normaliser, and a stabiliser that keeps both finite."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rondo.kernels.backend import choose, full_precision
from rondo.kernels.mlstm import chunked, reference
from rondo.kernels.mlstm.stabiliser import peaks
from rondo.kernels.mlstm.stretch import begin_stretch
from rondo.kernels.mlstm.summary import summarize
from rondo.kernels.summary import LogSummary, Stretch

__all__ = ["mlstm", "mlstm_state_size", "mlstm_stretch", "mlstm_summary"]

_IMPLEMENTATIONS = {"chunked": chunked.mlstm, "reference": reference.mlstm}
_NO_KERNEL = (
    "no Triton kernel is written for its state of V + 1 columns and its stabiliser; "
    "backend 'chunked' serves it by matrix products, on a GPU too"
)


def mlstm(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    input_gate: Tensor,
    forget_gate: Tensor,
    *,
    scale: float | None = None,
    eps: float = 1e-6,
    initial_state: Tensor | None = None,
    segment_ids: Tensor | None = None,
    chunk_size: int = 64,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Runs the recurrence over every row; the state restarts from zero at each new document.

        m' = max(log σ(f~) + m, i~)      i = exp(i~ - m')      f = exp(log σ(f~) + m - m')
        C' = f C + i k vᵀ                n' = f n + i k
        h  = scale C'ᵀ q / (max(|scale n'ᵀ q|, exp(-m')) + eps)

    C, n and exp(-m) are all relative to exp(m), which cancels but for eps: m counts as a constant,
    so that gradients of C and n are those at this m.

    Args:
        q: `(B, T, G, K)`, cast to the dtype of v.
        k: `(B, T, G, K)`, cast to the dtype of v.
        v: `(B, T, H, V)`, H a multiple of G; head h uses group `h // (H // G)`.
        input_gate: i~ `(B, T, H)`. Keep it float32.
        forget_gate: f~ `(B, T, H)`, before the sigmoid. Keep it float32.
        scale: factor on what is read, `K ** -0.5` by default.
        eps: added to the denominator.
        initial_state: `(B, H, K (V + 1) + 1)` before position 0, of its document.
        segment_ids: `(B, T)` integers, non-decreasing in a row, one id a document.
        chunk_size: positions handled by one matmul. Changes rounding only.
        backend: "auto", "reference" or "chunked".

    Returns:
        h `(B, T, H, V)` in the dtype of v, and the state `(B, H, K (V + 1) + 1)` after the last
        position, float32 (float64 for float64 inputs): the rows of (C, n), K of V + 1 numbers, and
        m. Both are differentiable once in every input.

    Raises:
        ValueError: a shape, dtype, size or backend does not fit.
    """
    _check(k, v, input_gate, forget_gate)
    size = mlstm_state_size(k.shape[-1], v.shape[-1])
    expected = (v.shape[0], v.shape[2], size)
    if initial_state is not None and tuple(initial_state.shape) != expected:
        raise ValueError(
            f"initial_state has shape {tuple(initial_state.shape)}, expected "
            f"(B, H, K (V + 1) + 1) = {expected}"
        )
    _check_eps(eps)
    run = choose("mlstm", backend, _IMPLEMENTATIONS, v.device, _NO_KERNEL)
    kind = torch.promote_types(v.dtype, torch.float32)
    if initial_state is None:
        initial_state = v.new_zeros(expected, dtype=kind)
    with full_precision(v.device):
        return run(
            q,
            k,
            v,
            *_gates(v, input_gate, forget_gate),
            _scale(k, scale),
            eps,
            initial_state.to(kind),
            segment_ids,
            chunk_size,
        )


def mlstm_summary(
    k: Tensor,
    v: Tensor,
    input_gate: Tensor,
    forget_gate: Tensor,
    *,
    segment_ids: Tensor | None = None,
    chunk_size: int = 64,
) -> LogSummary:
    """What the row does to any state, m included: `apply` gives the state after it.

    Args: as for `mlstm`.

    Returns:
        transition `(B, H, 1)`, the logarithm of what is kept, -inf where a document starts inside
        the row; state `(B, H, K (V + 1) + 1)`. Float32 (float64 for float64 inputs).

    Raises:
        ValueError: a shape, dtype or size does not fit.
    """
    _check(k, v, input_gate, forget_gate)
    with full_precision(v.device):
        gates = _gates(v, input_gate, forget_gate)
        found = peaks(*gates, segment_ids)
        return summarize(k, v, *gates, segment_ids, chunk_size, found)


def mlstm_stretch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    input_gate: Tensor,
    forget_gate: Tensor,
    *,
    scale: float | None = None,
    eps: float = 1e-6,
    segment_ids: Tensor | None = None,
    chunk_size: int = 64,
    backend: str = "auto",
) -> Stretch | None:
    """`mlstm` begun before its initial state is known: summary and outputs share one scan of the
    stabiliser. None for the reference, which has no such form.

    Args and Raises: as for `mlstm`.
    """
    _check(k, v, input_gate, forget_gate)
    _check_eps(eps)
    run = choose("mlstm", backend, _IMPLEMENTATIONS, v.device, _NO_KERNEL)
    if run is not chunked.mlstm:
        return None
    with full_precision(v.device):
        gates = _gates(v, input_gate, forget_gate)
        return begin_stretch(q, k, v, *gates, _scale(k, scale), eps, segment_ids, chunk_size)


def _scale(k: Tensor, scale: float | None) -> float:
    return k.shape[-1] ** -0.5 if scale is None else scale


def _gates(v: Tensor, input_gate: Tensor, forget_gate: Tensor) -> tuple[Tensor, Tensor]:
    """i~ and log σ(f~), in the dtype of sums."""
    kind = torch.promote_types(v.dtype, torch.float32)
    return input_gate.to(kind), torch.nn.functional.logsigmoid(forget_gate.to(kind))


def mlstm_state_size(key_dim: int, value_dim: int) -> int:
    """Numbers in a head's state: (C, n) and m."""
    return key_dim * (value_dim + 1) + 1


def _check_eps(eps: float) -> None:
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps is {eps}, expected a finite number, 0 or more")


def _check(k: Tensor, v: Tensor, input_gate: Tensor, forget_gate: Tensor) -> None:
    """What gated linear attention will not check."""
    for name, x in (("k", k), ("v", v)):
        if x.dim() != 4 or not x.is_floating_point():
            raise ValueError(
                f"{name} has shape {tuple(x.shape)} and dtype {x.dtype}, expected floating point "
                "(batch, time, heads, dim)"
            )
    for name, x in (("input_gate", input_gate), ("forget_gate", forget_gate)):
        if x.shape != v.shape[:3] or not x.is_floating_point():
            raise ValueError(
                f"{name} has shape {tuple(x.shape)} and dtype {x.dtype}, expected floating point "
                f"(B, T, H) = {tuple(v.shape[:3])}"
            )
