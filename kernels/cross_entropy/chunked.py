"""The loss by chunks of tokens: one buffer of logits is filled, turned into their gradient in
place, and filled again.

For a scalar loss the gradients are formed while the logits are there, so that the vocabulary
product is computed once. For per-token losses the backward pass computes the logits again, unless
one buffer holds those of all tokens: then it is kept.

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

BUFFER_BYTES = 16 * 2**20
"""Size of the logits buffer: smaller ones accumulate the weight gradient more often."""
MIN_CHUNK = 512
"""Tokens in a chunk at least: below, accumulating the weight gradient outweighs the products."""
SCRATCH_BYTES = 4 * 2**20
"""Size of the float32 buffer in which exponentials of a few rows at a time are taken."""


def chunked_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, valid: Tensor, reduction: str
) -> Tensor:
    """See `linear_cross_entropy`; hidden is `(N, D)`, targets and valid `(N,)`, and targets that
    are not valid hold any index in range."""
    if hidden.dtype == torch.float16:  # has no room for sums of exponentials
        hidden = hidden.float()
    if reduction == "none":
        return _TokenLosses.apply(hidden, weight, targets, valid)
    needs_gradients = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    count = valid.sum().clamp(min=1) if reduction == "mean" else 1
    return _TotalLoss.apply(hidden, weight, targets, valid, count, needs_gradients)


class _TotalLoss(torch.autograd.Function):
    """Sum of the losses over `count`; the gradients are made in the forward pass and saved."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        valid: Tensor,
        count: Tensor | int,
        needs_gradients: bool,
    ) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        upstream = valid.to(wide) / count if needs_gradients else None
        losses, *gradients = _losses(hidden, weight, targets, upstream)
        ctx.save_for_backward(*gradients)
        return (losses * valid).sum() / count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        # Looking at a value is free on a CPU, a pass over a matrix of the vocabulary is not.
        if not (_can_look_at(grad) and float(grad) == 1.0):
            # The upstream gradient has no dims, so the products keep their dtypes.
            grad_hidden, grad_weight = grad_hidden * grad, grad_weight * grad
        return grad_hidden, grad_weight, None, None, None, None


class _TokenLosses(torch.autograd.Function):
    """Loss of each token; the backward pass computes the logits again if they were not kept."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, valid: Tensor) -> Tensor:
        ctx.kept = _fits_one_buffer(hidden, weight) and any(ctx.needs_input_grad)
        if ctx.kept:
            losses, _, _ = _results(hidden, weight, None)
            logits = hidden.new_empty(hidden.shape[0], weight.shape[0])
            sums = _losses_into(losses, logits, hidden, weight.to(hidden.dtype), targets)
            ctx.save_for_backward(hidden, weight, valid, logits, sums)
        else:
            losses, _, _ = _losses(hidden, weight, targets, None)
            ctx.save_for_backward(hidden, weight, valid, targets)
        return losses * valid

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, valid, *more = ctx.saved_tensors
        upstream = grad * valid
        if ctx.kept:
            logits, sums = more
            row = upstream[:, None] / sums
            grad_hidden = (logits @ weight.to(hidden.dtype)) * row
            update = logits.T @ (hidden * row).to(hidden.dtype)
            return grad_hidden.to(hidden.dtype), update.to(weight.dtype), None, None
        _, grad_hidden, grad_weight = _losses(hidden, weight, more[0], upstream)
        return grad_hidden, grad_weight, None, None


def _fits_one_buffer(hidden: Tensor, weight: Tensor) -> bool:
    """Whether logits can be kept: there are few enough, and the call is not being compiled."""
    size = hidden.shape[0] * weight.shape[0] * hidden.element_size()
    return 0 < size <= BUFFER_BYTES and not torch.compiler.is_compiling()


def _can_look_at(x: Tensor) -> bool:
    """Whether branching on values costs nothing: a subclass (fake or distributed) may have none."""
    return x.is_cpu and type(x) is Tensor and not torch.compiler.is_compiling()


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
        sums = _losses_into(losses[part], logits, hidden[part], head, targets[part])
        if upstream is not None:
            # The sums divide the narrower sides of the products.
            row = upstream[part, None] / sums
            torch.mm(logits, head, out=grad_hidden[part])
            grad_hidden[part] = grad_hidden[part] * row
            update = logits.T @ (hidden[part] * row).to(hidden.dtype)
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
    losses: Tensor, logits: Tensor, hidden: Tensor, head: Tensor, targets: Tensor
) -> Tensor:
    """Fills `losses`, and `logits` with their gradients times sums `(N, 1)`, which it returns."""
    exact = (hidden.to(losses.dtype) * head[targets]).sum(dim=1, keepdim=True)
    shift = exact.to(hidden.dtype)
    torch.addmm(shift, hidden, head.T, beta=-1, out=logits)
    rows = max(1, SCRATCH_BYTES // (head.shape[0] * losses.element_size()))
    if not stays_in_cache(losses):
        rows = len(losses)
    sums = torch.empty_like(exact)
    scratch = losses.new_empty(min(rows, len(losses)), head.shape[0])
    for start in range(0, len(losses), rows):
        part = slice(start, min(start + rows, len(losses)))
        powers = scratch[: part.stop - part.start]
        top = _exponentials(powers, sums[part], logits[part])
        losses[part] = (sums[part].log() + top - exact[part] + shift[part]).squeeze(1)
        logits[part] = powers.scatter_add_(1, targets[part, None], -sums[part])
    return sums


def _exponentials(powers: Tensor, sums: Tensor, logits: Tensor) -> Tensor | float:
    """Fills `powers` with `exp(logits - top)` and `sums` with those of its rows; returns top,
    `(N, 1)` or 0.

    The target's own logit is about 0, so that no sum is below about 1 and only large logits make
    a maximum necessary. On a CPU a look at the sums is cheaper than a pass for the maximum."""
    if _can_look_at(sums):
        torch.sum(powers.copy_(logits).exp_(), dim=1, keepdim=True, out=sums)
        if float(sums.amax()) < torch.finfo(sums.dtype).max ** 0.5:
            return 0.0
    top = logits.amax(dim=1, keepdim=True).to(powers.dtype)
    torch.sum(powers.copy_(logits).sub_(top).exp_(), dim=1, keepdim=True, out=sums)
    return top
