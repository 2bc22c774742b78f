"""The elementwise linear recurrence `h_t = a_t * h_{t-1} + b_t` (HGRN, LRU, Mamba and kin)."""

from __future__ import annotations

import torch
from torch import Tensor

from rondo.kernels.backend import choose
from rondo.kernels.scan import chunked, reference
from rondo.kernels.summary import DiagonalSummary

__all__ = ["linear_scan", "linear_scan_summary"]

_IMPLEMENTATIONS = {"chunked": chunked.linear_scan, "reference": reference.linear_scan}


def linear_scan(
    a: Tensor,
    b: Tensor,
    *,
    initial_state: Tensor | None = None,
    segment_ids: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Scans every row; the state restarts from zero at each new document.

    Args:
        a: `(B, T, ...)` factors, meant for [-1, 1]; 0 is exact.
        b: `(B, T, ...)` inputs, of the same shape.
        initial_state: `(B, ...)` before position 0, of the document of position 0.
        segment_ids: `(B, T)` integers, non-decreasing in a row, one id a document.
        backend: "auto", "reference" or "chunked".

    Returns:
        h `(B, T, ...)` in the dtype of b, and the last state `(B, ...)`, float32 (float64 for
        float64 inputs). Both are differentiable once in every input.

    Raises:
        ValueError: a shape, dtype or backend does not fit.
    """
    _check(a, b, segment_ids)
    expected = (b.shape[0], *b.shape[2:])
    if initial_state is not None and tuple(initial_state.shape) != expected:
        raise ValueError(
            f"initial_state has shape {tuple(initial_state.shape)}, expected (B, ...) = {expected}"
        )
    return choose("linear_scan", backend, _IMPLEMENTATIONS, b.device)(
        a, b, initial_state, segment_ids
    )


def linear_scan_summary(
    a: Tensor, b: Tensor, *, segment_ids: Tensor | None = None
) -> DiagonalSummary:
    """What the row does to any state: `transition * state + summary.state` is the state after it.

    Args and Raises: as for `linear_scan`.

    Returns:
        transition `(B, ...)`, the product of a over the row, 0 where a document starts inside it;
        state `(B, ...)`, the one a zero state turns into. Both are differentiable.
    """
    _check(a, b, segment_ids)
    ones = torch.ones_like(b[:, 0])
    _, state = chunked.linear_scan(a, b, None, segment_ids)
    _, transition = chunked.linear_scan(a, torch.zeros_like(b), ones, segment_ids)
    return DiagonalSummary(transition, state)


def _check(a: Tensor, b: Tensor, segment_ids: Tensor | None) -> None:
    for name, x in (("a", a), ("b", b)):
        if x.dim() < 2 or x.shape[1] == 0 or not x.is_floating_point():
            raise ValueError(
                f"{name} has shape {tuple(x.shape)} and dtype {x.dtype}, expected floating point "
                "(batch, time, ...) with at least one position"
            )
    if a.shape != b.shape:
        raise ValueError(f"a has shape {tuple(a.shape)}, b has {tuple(b.shape)}: expected equal")
    if segment_ids is not None and (
        segment_ids.shape != b.shape[:2] or segment_ids.is_floating_point()
    ):
        raise ValueError(
            f"segment_ids has shape {tuple(segment_ids.shape)} and dtype {segment_ids.dtype}, "
            f"expected integers (B, T) = {tuple(b.shape[:2])}"
        )
