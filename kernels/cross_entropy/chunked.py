"""The loss by chunks of tokens: one buffer of logits is filled, turned into their gradient in
place, and filled again. Logits are `(vocabulary, tokens)`: the gradient of the weight is then a
product of matrices as they lie, for which a CPU needs half the time.

For a scalar loss the gradients are formed while the logits are there, so that the vocabulary
product is computed once. For per-token losses the backward pass computes the logits again, unless
one buffer holds those of all tokens: then it is kept.

Logits are taken relative to the target's own logit, inside the product (`beta` of addmm), before
they are rounded: in bfloat16 the rounding error of a probability is then small exactly where
probability is large, instead of growing with the size of the logits. The product also takes them
to base 2 (`alpha`), whose exponentials cost a CPU a quarter of those of base e. A cap is put on
them while their exponentials are taken, which are then multiplied by its slope: what the buffer
holds at the end are gradients of the logits without it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rondo.kernels.pointwise import soft_cap_difference_
from rondo.kernels.tiles import stays_in_cache

BUFFER_BYTES = 16 * 2**20
"""Size of the logits buffer: smaller ones accumulate the weight gradient more often."""
KEPT_BYTES = 256 * 2**20
"""Logits that a loss of each token keeps for the backward pass at most; more are made again."""
MIN_CHUNK = 512
"""Tokens in a chunk at least: below, accumulating the weight gradient outweighs the products."""
LOG2E = 1 / math.log(2)
SCRATCH_BYTES = 4 * 2**20
"""Size of the float32 buffer in which exponentials of a few words at a time are taken."""


def chunked_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    valid: Tensor,
    reduction: str,
    cap: float | None,
) -> Tensor:
    """See `linear_cross_entropy`; hidden is `(N, D)`, targets and valid `(N,)`, and targets that
    are not valid hold any index in range."""
    if hidden.dtype == torch.float16:  # has no room for sums of exponentials
        hidden = hidden.float()
    if reduction == "none":
        return _TokenLosses.apply(hidden, weight, targets, valid, cap)
    needs_gradients = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    count = valid.sum().clamp(min=1) if reduction == "mean" else 1
    return _TotalLoss.apply(hidden, weight, targets, valid, count, cap, needs_gradients)


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
        cap: float | None,
        needs_gradients: bool,
    ) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        upstream = valid.to(wide) / count if needs_gradients else None
        losses, *gradients = _losses(hidden, weight, targets, upstream, cap)
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
        return grad_hidden, grad_weight, None, None, None, None, None


class _TokenLosses(torch.autograd.Function):
    """Loss of each token; the backward pass computes the logits again if they were not kept."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        valid: Tensor,
        cap: float | None,
    ) -> Tensor:
        ctx.cap = cap
        ctx.keeps = _can_be_kept(hidden, weight) and any(ctx.needs_input_grad)
        if ctx.keeps:
            losses, *_ = _results(hidden, weight, None)
            head, kept = weight.to(hidden.dtype), []
            for part in _parts(hidden, weight):
                logits = hidden.new_empty(weight.shape[0], part.stop - part.start)
                sums = _losses_into(losses[part], logits, hidden[part], head, targets[part], cap)
                kept += [logits, sums]
            ctx.save_for_backward(hidden, weight, valid, *kept)
        else:
            losses, *_ = _losses(hidden, weight, targets, None, cap)
            ctx.save_for_backward(hidden, weight, valid, targets)
        return losses * valid

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, valid, *more = ctx.saved_tensors
        upstream = grad * valid
        if ctx.keeps:
            gradients = _Gradients(hidden, weight, weight.to(hidden.dtype), upstream)
            parts = _parts(hidden, weight)
            for part, logits, sums in zip(parts, more[::2], more[1::2], strict=True):
                gradients.add(part, logits, sums)
            return *gradients.sums(), None, None, None
        _, grad_hidden, grad_weight = _losses(hidden, weight, more[0], upstream, ctx.cap)
        return grad_hidden, grad_weight, None, None, None


def _can_be_kept(hidden: Tensor, weight: Tensor) -> bool:
    """Whether logits can be kept: there are few enough, and the call is not being compiled."""
    size = hidden.shape[0] * weight.shape[0] * hidden.element_size()
    return 0 < size <= KEPT_BYTES and not torch.compiler.is_compiling()


def _parts(hidden: Tensor, weight: Tensor) -> list[slice]:
    """Stretches of tokens whose logits are treated at a time."""
    chunk = max(MIN_CHUNK, BUFFER_BYTES // (weight.shape[0] * hidden.element_size()))
    tokens = hidden.shape[0]
    return [slice(start, min(start + chunk, tokens)) for start in range(0, tokens, chunk)]


class _Gradients:
    """Gradients of hidden and weight, from one stretch of tokens after another; `head` is the
    weight in the dtype of hidden."""

    def __init__(self, hidden: Tensor, weight: Tensor, head: Tensor, upstream: Tensor) -> None:
        losses, self.grad_hidden, self.grad_weight = _results(hidden, weight, upstream)
        self.hidden, self.upstream, self.wide = hidden, upstream, losses.dtype
        self.turned = head.T.contiguous()
        self.total: Tensor | None = None

    def add(self, part: slice, logits: Tensor, sums: Tensor) -> None:
        """Takes what `_losses_into` returned for `part` of the tokens."""
        # The sums divide the narrower sides of the products.
        row = (self.upstream[part] / sums)[:, None]
        self.grad_hidden[part] = (self.turned @ logits).T * row
        update = logits @ (self.hidden[part] * row).to(self.hidden.dtype)
        self.total = update.to(self.wide) if self.total is None else self.total.add_(update)

    def sums(self) -> tuple[Tensor, Tensor]:
        """The gradients of hidden and weight."""
        if self.total is None:
            return self.grad_hidden, self.grad_weight.zero_()
        return self.grad_hidden, self.total.to(self.grad_weight.dtype)


def _can_look_at(x: Tensor) -> bool:
    """Whether branching on values costs nothing: a subclass (fake or distributed) may have none."""
    return x.is_cpu and type(x) is Tensor and not torch.compiler.is_compiling()


def _losses(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    upstream: Tensor | None,
    cap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses `(N,)` and the gradients of hidden and weight when the losses have the gradients
    `upstream` `(N,)` (empty tensors when there is no `upstream`)."""
    # Compiled, this would be one long unrolled graph; as one operator it runs as it does here.
    run = _losses_operator if torch.compiler.is_compiling() else _walk
    return run(hidden, weight, targets, upstream, cap)


def _walk(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    upstream: Tensor | None,
    cap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `_losses`."""
    losses, *none = _results(hidden, weight, None)
    head, parts = weight.to(hidden.dtype), _parts(hidden, weight)
    gradients = None if upstream is None else _Gradients(hidden, weight, head, upstream)
    buffer = hidden.new_empty(len(head) * (parts[0].stop if parts else 0))
    for part in parts:
        count = part.stop - part.start
        logits = buffer[: len(head) * count].view(len(head), count)
        sums = _losses_into(losses[part], logits, hidden[part], head, targets[part], cap)
        if gradients is not None:
            gradients.add(part, logits, sums)
    grad_hidden, grad_weight = none if gradients is None else gradients.sums()
    return losses, grad_hidden, grad_weight


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
    schema="(Tensor hidden, Tensor weight, Tensor targets, Tensor? upstream, float? cap) "
    "-> (Tensor, Tensor, Tensor)",
)  # fmt: skip


@_losses_operator.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    upstream: Tensor | None,
    cap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return _results(hidden, weight, upstream)


def _losses_into(
    losses: Tensor,
    logits: Tensor,
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    cap: float | None,
) -> Tensor:
    """Fills `losses`, and `logits` `(V, N)` with their gradients times sums `(N,)`, which it
    returns."""
    exact = (hidden.to(losses.dtype) * head[targets]).sum(dim=1)
    shift = exact.to(hidden.dtype)
    _relative_logits(logits, hidden, head, shift)
    at = targets, torch.arange(len(targets), device=targets.device)
    own, top = logits[at].to(losses.dtype), None
    binary_shift, binary_cap = shift.to(losses.dtype) * LOG2E, None if cap is None else cap * LOG2E
    own_slope = soft_cap_difference_(own, binary_shift, binary_cap)
    sums = torch.empty_like(exact)
    if _can_look_at(sums):
        # The target's own logit is about 0, so that no sum is below about 1 and only large logits
        # make a maximum necessary. To look at the sums is cheaper than a pass for the maximum.
        _exponentials(logits, sums, None, binary_shift, binary_cap)
        if not float(sums.amax()) < torch.finfo(sums.dtype).max ** 0.5:
            _relative_logits(logits, hidden, head, shift)
            top = logits.amax(dim=0).to(sums.dtype)
    else:
        top = logits.amax(dim=0).to(sums.dtype)
    if top is not None:
        soft_cap_difference_(top, binary_shift, binary_cap)
        _exponentials(logits, sums, top, binary_shift, binary_cap)
        own = own - top
    # Of a probability near 1 little is left: the target's is not rounded before.
    gradient = own.exp2_() - sums
    if own_slope is not None:
        gradient *= own_slope
    logits[at] = gradient.to(logits.dtype)
    rest = exact - shift
    soft_cap_difference_(rest, shift, cap)
    torch.sub(sums.log(), rest, out=losses)
    if top is not None:
        losses.add_(top, alpha=1 / LOG2E)
    return sums


def _relative_logits(logits: Tensor, hidden: Tensor, head: Tensor, shift: Tensor) -> None:
    """Fills `logits` `(V, N)` with those of `hidden` `(N, D)` less `shift` `(N,)`, in base 2."""
    torch.addmm(shift, head, hidden.T, beta=-LOG2E, alpha=LOG2E, out=logits)


def _exponentials(
    logits: Tensor, sums: Tensor, top: Tensor | None, shift: Tensor, cap: float | None
) -> None:
    """Fills `sums` with those over words of the exponentials of `logits`, which are relative to
    `shift`, with a `cap` on them, less `top`; turns `logits` into the exponentials times the
    slope of the cap. All of them are in base 2."""
    words, tokens = logits.shape
    step = words
    if stays_in_cache(sums):
        step = max(1, SCRATCH_BYTES // max(tokens * sums.element_size(), 1))
    scratch = sums.new_empty(min(step, words), tokens)
    sums.zero_()
    for start in range(0, words, step):
        part = logits[start : start + step]
        powers = scratch[: len(part)].copy_(part)
        slope = soft_cap_difference_(powers, shift, cap)
        if top is not None:
            powers.sub_(top)
        sums += powers.exp2_().sum(dim=0)
        if slope is not None:
            powers.mul_(slope)
        part.copy_(powers)
