"""The elementwise linear recurrence `h_t = a_t * h_{t-1} + b_t` (HGRN, LRU, Mamba and kin)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from rondo.kernels.backend import choose, triton_refusal
from rondo.kernels.scan import chunked, chunked_stretch, reference
from rondo.kernels.summary import DiagonalSummary, Stretch

__all__ = ["linear_scan", "linear_scan_stretch", "linear_scan_summary"]


def _triton_scan(*arguments: Any) -> tuple[Tensor, Tensor]:
    from rondo.kernels.scan import triton

    return triton.linear_scan(*arguments)


def _triton_summary(*arguments: Any) -> tuple[Tensor, Tensor]:
    from rondo.kernels.scan import triton

    return triton.summarize(*arguments)


def _triton_stretch(*arguments: Any) -> Stretch:
    from rondo.kernels.scan import triton_stretch

    return triton_stretch.begin_stretch(*arguments)


_IMPLEMENTATIONS = {
    "chunked": chunked.linear_scan,
    "reference": reference.linear_scan,
    "triton": _triton_scan,
}
_SUMMARIES = {"chunked": chunked.summarize, "triton": _triton_summary}
_STRETCHES = {chunked.linear_scan: chunked_stretch.begin_stretch, _triton_scan: _triton_stretch}


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
        backend: "auto", "reference", "chunked" or "triton".

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
    refusal = triton_refusal(a, b, initial_state)
    run = choose("linear_scan", backend, _IMPLEMENTATIONS, b.device, refusal)
    return run(a, b, initial_state, segment_ids)


def linear_scan_summary(
    a: Tensor, b: Tensor, *, segment_ids: Tensor | None = None, backend: str = "auto"
) -> DiagonalSummary:
    """What the row does to any state: `transition * state + summary.state` is the state after it.

    Args and Raises: as for `linear_scan`; there is no reference.

    Returns:
        transition `(B, ...)`, the product of a over the row, 0 where a document starts inside it;
        state `(B, ...)`, the one a zero state turns into. Both are differentiable.
    """
    _check(a, b, segment_ids)
    refusal = triton_refusal(a, b)
    run = choose("linear_scan_summary", backend, _SUMMARIES, b.device, refusal)
    return DiagonalSummary(*run(a, b, segment_ids))


def linear_scan_stretch(
    a: Tensor, b: Tensor, *, segment_ids: Tensor | None = None, backend: str = "auto"
) -> Stretch | None:
    """`linear_scan` begun before its initial state is known: one scan from zero serves the summary
    and the outputs. None for the reference, which has no such form.

    Args and Raises: as for `linear_scan`.
    """
    _check(a, b, segment_ids)
    run = choose("linear_scan", backend, _IMPLEMENTATIONS, b.device, triton_refusal(a, b))
    begin = _STRETCHES.get(run)
    if begin is None:
        return None
    flat, shape = begin(a, b, segment_ids), b[:, 0].shape

    def finish(state: Tensor) -> tuple[Tensor, Tensor]:
        h, last = flat.finish(state.reshape(shape[0], -1))
        return h.view(b.shape), last.view(shape)

    return Stretch(DiagonalSummary(*(x.view(shape) for x in flat.summary)), finish)


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
