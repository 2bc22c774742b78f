"""Causal softmax attention with grouped heads, sliding windows, documents and a key/value cache."""

from __future__ import annotations

from torch import Tensor

from rondo.kernels.backend import choose
from rondo.kernels.softmax_attention.chunked import chunked_attention, chunked_attention_lse
from rondo.kernels.softmax_attention.flash import flash_attention, flash_refusal
from rondo.kernels.softmax_attention.prefix import attend_prefix
from rondo.kernels.softmax_attention.reference import reference_attention, reference_attention_lse

__all__ = ["attend_prefix", "attention"]

_NO_KERNEL = "it has no Triton kernel: 'chunked' takes torch's, 'flash' those of flash-attn"
IMPLEMENTATIONS = {
    "reference": reference_attention,
    "chunked": chunked_attention,
    "flash": flash_attention,
}
LSE = {"reference": reference_attention_lse, "chunked": chunked_attention_lse}
"""Those that return the log-sum-exp too."""


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None = None,
    scale: float | None = None,
    segment_ids: Tensor | None = None,
    key_segment_ids: Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """`o_i = sum_j softmax_j(scale * q_i . k_j) v_j` over the keys `j` that query `i` may see.

    Query `i` of T sits at key position `p = S - T + i` (a cache comes first) and sees the keys
    `p - window < j <= p` of its own document.

    Args:
        q: `(B, T, H, D)`.
        k: `(B, S, G, D)` with `S >= T` and `H % G == 0`; query head h reads group `h // (H // G)`.
        v: `(B, S, G, Dv)`.
        window: how many keys a query sees, itself included; None for all.
        scale: factor on the scores; None for `D ** -0.5`.
        segment_ids: `(B, T)` integer document of each query, non-decreasing in a row.
        key_segment_ids: `(B, S)` document of each key; its last T columns must repeat
            `segment_ids`. May be left out when `S == T`.
        return_lse: also return the log-sum-exp of each query's scores, to join the result with
            attention to further keys (`attend_prefix`). Gradients pass through it.
        backend: "auto", "reference", "chunked", or "flash" (the flash-attn package, on CUDA;
            it has no gradient of the log-sum-exp). "auto" takes flash where it serves these
            inputs, else chunked.

    Returns:
        `(B, T, H, Dv)` in the dtype of `v`; with `return_lse` also `(B, T, H)`, float32 (float64
        for float64 inputs).

    Raises:
        ValueError: shapes, window or backend do not fit.
    """
    check_inputs(q, k, v, window, segment_ids, key_segment_ids)
    if segment_ids is not None and key_segment_ids is None:
        key_segment_ids = segment_ids
    reason = "asked for"
    if backend == "auto":
        backend, reason = _best(q, k, v, return_lse)
    implementations = LSE if return_lse else IMPLEMENTATIONS
    run = choose("attention", backend, implementations, q.device, _NO_KERNEL, reason=reason)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if window is not None and window >= k.shape[1]:
        window = None
    return run(q, k, v, window, scale, segment_ids, key_segment_ids)


def _best(q: Tensor, k: Tensor, v: Tensor, return_lse: bool) -> tuple[str, str]:
    """What "auto" takes, and why; "auto" itself where nothing is to be said of flash."""
    refusal = "it has no gradient of the log-sum-exp" if return_lse else flash_refusal(q, k, v)
    if refusal is None:
        return "flash", "first of flash, chunked, reference: the package takes these inputs"
    return ("chunked", f"flash cannot: {refusal}") if q.device.type == "cuda" else ("auto", "")


def check_inputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None,
    segment_ids: Tensor | None,
    key_segment_ids: Tensor | None,
) -> None:
    """Raises ValueError for inputs that do not fit together."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(f"attention: {name} must be (B, T, H, D), got {tuple(x.shape)}")
    batch, time, heads, dim = q.shape
    _, keys, groups, _ = k.shape
    if k.shape[0] != batch or k.shape[3] != dim:
        raise ValueError(
            f"attention: k {tuple(k.shape)} must share batch and head dim with q {tuple(q.shape)}"
        )
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(
            f"attention: v {tuple(v.shape)} must share batch, time and heads with k "
            f"{tuple(k.shape)}"
        )
    if heads % groups:
        raise ValueError(f"attention: {heads} query heads do not divide by {groups} key heads")
    if keys < time:
        raise ValueError(f"attention: {keys} keys are fewer than {time} queries")
    if window is not None and window < 1:
        raise ValueError(f"attention: window must be at least 1 or None, got {window}")
    if segment_ids is None and key_segment_ids is not None:
        raise ValueError("attention: key_segment_ids needs segment_ids as well")
    if segment_ids is None:
        return
    if segment_ids.shape != (batch, time):
        raise ValueError(
            f"attention: segment_ids must be {(batch, time)}, got {tuple(segment_ids.shape)}"
        )
    if key_segment_ids is None and keys != time:
        raise ValueError(
            f"attention: key_segment_ids {(batch, keys)} is required with segment_ids when there "
            f"are more keys ({keys}) than queries ({time})"
        )
    if key_segment_ids is not None and key_segment_ids.shape != (batch, keys):
        raise ValueError(
            f"attention: key_segment_ids must be {(batch, keys)}, "
            f"got {tuple(key_segment_ids.shape)}"
        )
