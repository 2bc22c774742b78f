"""Cross-entropy of a linear vocabulary head, without the logits of all tokens in memory."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from rondo.kernels.backend import choose, triton_refusal
from rondo.kernels.cross_entropy.chunked import chunked_loss
from rondo.kernels.cross_entropy.reference import reference_loss

__all__ = ["linear_cross_entropy"]


def _triton(*arguments: Any) -> Tensor:
    from rondo.kernels.cross_entropy.triton import triton_loss

    return triton_loss(*arguments)


IMPLEMENTATIONS = {"reference": reference_loss, "chunked": chunked_loss, "triton": _triton}
REDUCTIONS = ("none", "sum", "mean")


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "none",
    logit_cap: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """`logsumexp_v(z_v) - z_target`, in nats, of the logits `z_v = hidden . weight_v`.

    Args:
        hidden: `(..., D)`.
        weight: `(V, D)`; cast to the dtype of `hidden` for the products.
        targets: `(...)` int64 in `[0, V)`, or `ignore_index` (loss 0, no gradient).
        reduction: "none" `(...)`; "sum"; "mean" over the targets that are not ignored, 0 when
            all are.
        logit_cap: of `z_v = cap tanh(hidden . weight_v / cap)` (`kernels.soft_cap`); None for
            logits without a cap.
        backend: "auto", "reference", "chunked" or "triton".

    Returns:
        float32 losses (float64 when `hidden` is).

    Raises:
        ValueError: shapes, dtype, reduction, cap or backend do not fit, or a target lies outside
            the vocabulary (looked at on CPU, when the call is not being compiled).
    """
    if hidden.ndim < 1 or weight.ndim != 2 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"linear_cross_entropy: hidden {tuple(hidden.shape)} must be (..., D) and weight "
            f"{tuple(weight.shape)} (V, D) with the same D"
        )
    if targets.shape != hidden.shape[:-1]:
        raise ValueError(
            f"linear_cross_entropy: targets {tuple(targets.shape)} must be "
            f"{tuple(hidden.shape[:-1])}, the shape of hidden without its last dim"
        )
    if targets.dtype != torch.int64:
        raise ValueError(f"linear_cross_entropy: targets must be int64, got {targets.dtype}")
    if reduction not in REDUCTIONS:
        raise ValueError(
            f"linear_cross_entropy: reduction must be one of {', '.join(REDUCTIONS)}, "
            f"got {reduction!r}"
        )
    if logit_cap is not None and not 0 < logit_cap < math.inf:
        raise ValueError(
            f"linear_cross_entropy: logit_cap must be a finite number above 0, or None, "
            f"got {logit_cap}"
        )
    _check_range(targets, weight.shape[0], ignore_index)
    refusal = triton_refusal(hidden, weight)
    run = choose("linear_cross_entropy", backend, IMPLEMENTATIONS, hidden.device, refusal)
    flat = targets.reshape(-1)
    valid = flat != ignore_index
    tokens = hidden.reshape(-1, hidden.shape[-1])
    losses = run(tokens, weight, flat.where(valid, 0), valid, reduction, logit_cap)
    return losses.view(targets.shape) if reduction == "none" else losses


def _check_range(targets: Tensor, vocabulary: int, ignore_index: int) -> None:
    """Raises ValueError for a target outside the vocabulary, where looking at values is cheap."""
    # A subclass (fake or distributed tensors) has no values to look at here.
    if torch.compiler.is_compiling() or type(targets) is not Tensor or not targets.is_cpu:
        return
    wrong = ((targets < 0) | (targets >= vocabulary)) & (targets != ignore_index)
    if wrong.any():
        value = int(targets[wrong][0])
        raise ValueError(
            f"linear_cross_entropy: target {value} is outside the vocabulary of {vocabulary} "
            f"(valid: 0 to {vocabulary - 1}, or ignore_index {ignore_index})"
        )
