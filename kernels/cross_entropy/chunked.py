"""The loss by chunks of tokens: one buffer of logits is filled, turned into their gradient in
place, and filled again.

For a scalar loss the gradients are formed while the logits are there, so that the vocabulary
product is computed once; for per-token losses the backward pass computes the logits again.

Logits are taken relative to the target's own logit, inside the product (`beta` of addmm), before
they are rounded: in bfloat16 the rounding error of a probability is then small exactly where
probability is large, instead of growing with the size of the logits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rondo.kernels.tiles import stays_in_cache

BUFFER_BYTES = 8 * 2**20
"""Size of the logits buffer: larger ones leave the last-level cache, smaller ones accumulate the
weight gradient more often."""
MIN_CHUNK = 512
"""Tokens in a chunk at least: below, accumulating the weight gradient outweighs the products."""
SOFTMAX_BYTES = 2 * 2**20
"""Size of the float32 buffer in which the softmax of a few rows at a time is taken."""


def chunked_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, valid: Tensor, reduction: str
) -> Tensor:
    """See `linear_cross_entropy`; hidden is `(N, D)`, targets and valid `(N,)`, and targets that
    are not valid hold any index in range."""
    if reduction == "none":
        return _TokenLosses.apply(hidden, weight, targets, valid)
    needs_gradients = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    total = _TotalLoss.apply(hidden, weight, targets, valid, needs_gradients)
    return total if reduction == "sum" else total / valid.sum().clamp(min=1)


class _TotalLoss(torch.autograd.Function):
    """Sum of the losses; the gradients are made in the forward pass and saved."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        valid: Tensor,
        needs_gradients: bool,
    ) -> Tensor:
        upstream = valid.to(hidden.dtype) if needs_gradients else None
        losses, *gradients = _losses(hidden, weight, targets, upstream)
        ctx.save_for_backward(*gradients)
        return (losses * valid).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        # The upstream gradient has no dims, so the products keep their dtypes.
        return grad_hidden * grad, grad_weight * grad, None, None, None


class _TokenLosses(torch.autograd.Function):
    """Loss of each token; the backward pass computes the logits again."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, valid: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight, targets, valid)
        losses, _, _ = _losses(hidden, weight, targets, None)
        return losses * valid

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, valid = ctx.saved_tensors
        upstream = (grad * valid).to(hidden.dtype)
        _, grad_hidden, grad_weight = _losses(hidden, weight, targets, upstream)
        return grad_hidden, grad_weight, None, None


def _losses(
    hidden: Tensor, weight: Tensor, targets: Tensor, upstream: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses `(N,)` and the gradients of hidden and weight when the losses have the gradients
    `upstream` `(N,)` (empty tensors when there is no `upstream`)."""
    # Compiled, this would be one long unrolled graph; as one operator it runs as it does here.
    run = _losses_operator if torch.compiler.is_compiling() else _walk
    return run(hidden, weight, targets, upstream)


def _walk(
    hidden: Tensor, weight: Tensor, targets: Tensor, upstream: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """See `_losses`."""
    tokens, vocabulary = hidden.shape[0], weight.shape[0]
    losses, grad_hidden, grad_weight = _results(hidden, weight, upstream)
    wide_grad = grad_weight if tokens else grad_weight.zero_()
    head = weight.to(hidden.dtype)
    chunk = max(MIN_CHUNK, BUFFER_BYTES // (vocabulary * hidden.element_size()))
    buffer = hidden.new_empty(min(chunk, tokens), vocabulary)
    for start in range(0, tokens, chunk):
        part = slice(start, min(start + chunk, tokens))
        logits = buffer[: part.stop - part.start]
        _losses_into(losses[part], logits, hidden[part], head, targets[part], upstream is not None)
        if upstream is not None:
            row = upstream[part, None]
            torch.mm(logits, head, out=grad_hidden[part])
            grad_hidden[part].mul_(row)
            update = logits.T @ (hidden[part] * row)
            wide_grad = update.to(losses.dtype) if start == 0 else wide_grad.add_(update)
    return losses, grad_hidden, wide_grad.to(weight.dtype)


def _results(
    hidden: Tensor, weight: Tensor, upstream: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """What `_losses` returns, not filled in."""
    losses = hidden.new_empty(
        hidden.shape[0], dtype=torch.promote_types(hidden.dtype, torch.float32)
    )
    if upstream is None:
        return losses, hidden.new_empty(0), weight.new_empty(0)
    return losses, hidden.new_empty(hidden.shape), weight.new_empty(weight.shape)


_losses_operator = torch.library.custom_op(
    "rondo::linear_cross_entropy", _walk, mutates_args=(),
    schema="(Tensor hidden, Tensor weight, Tensor targets, Tensor? upstream) "
    "-> (Tensor, Tensor, Tensor)",
)  # fmt: skip


@_losses_operator.register_fake
def _(
    hidden: Tensor, weight: Tensor, targets: Tensor, upstream: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    return _results(hidden, weight, upstream)


def _losses_into(
    losses: Tensor, logits: Tensor, hidden: Tensor, head: Tensor, targets: Tensor, gradient: bool
) -> None:
    """Fills `losses`, and `logits` with their gradients `softmax - onehot` when `gradient`."""
    exact = (hidden.to(losses.dtype) * head[targets]).sum(dim=1, keepdim=True)
    shift = exact.to(hidden.dtype)
    torch.addmm(shift, hidden, head.T, beta=-1, out=logits)
    relative = (exact - shift).squeeze(1)
    rows = max(1, SOFTMAX_BYTES // (head.shape[0] * losses.element_size()))
    if not stays_in_cache(losses):
        rows = len(losses)
    scratch = losses.new_empty(min(rows, len(losses)), head.shape[0])
    minus_one = losses.new_full((len(scratch), 1), -1)
    for start in range(0, len(losses), rows):
        part = slice(start, min(start + rows, len(losses)))
        probabilities = scratch[: part.stop - part.start]
        probabilities.copy_(logits[part])
        top = probabilities.amax(dim=1)
        torch.softmax(probabilities, dim=1, out=probabilities)
        # The largest probability is exp(top - logsumexp) and at least 1 / V.
        losses[part] = top - probabilities.amax(dim=1).log() - relative[part]
        if gradient:
            probabilities.scatter_add_(1, targets[part, None], minus_one[: part.stop - part.start])
            logits[part] = probabilities
