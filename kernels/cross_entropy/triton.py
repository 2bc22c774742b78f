"""The loss by chunks of tokens on a GPU: products by the vendor's library, all else in one kernel.

A chunk's logits fill one buffer; `triton_losses.py` turns them into losses and, in place, into
their gradient, which two more products spread to hidden and weight. A scalar loss computes the
logits once, its gradients are made in the forward pass; per-token losses compute them again in the
backward pass. As in the chunked form, logits are taken relative to the target's own, inside the
product.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rondo.kernels.backend import full_precision
from rondo.kernels.cross_entropy.triton_losses import losses_and_gradients, target_logits
from rondo.kernels.triton_configs import Config
from rondo.kernels.triton_support import Compilation, launch, opaque

BUFFER_BYTES = 256 * 2**20
"""Size of the logits buffer."""
MIN_CHUNK = 512
"""Tokens in a chunk at least: fewer leave the products without enough work."""


def triton_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    valid: Tensor,
    reduction: str,
    cap: float | None,
) -> Tensor:
    """See `linear_cross_entropy`; hidden is `(N, D)`, targets and valid `(N,)`, and targets that
    are not valid hold any index in range."""
    if hidden.dtype == torch.float16:  # has no room for gradients as small as probabilities
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
        upstream = valid.float() / count if needs_gradients else None
        losses, *gradients = _losses(hidden, weight, targets, upstream, cap)
        ctx.save_for_backward(*gradients)
        return (losses * valid).sum() / count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # The upstream gradient has no dims, so the products keep their dtypes.
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grad, grad_weight * grad, None, None, None, None, None


class _TokenLosses(torch.autograd.Function):
    """Loss of each token; the backward pass computes the logits again."""

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
        ctx.save_for_backward(hidden, weight, targets, valid)
        return _losses(hidden, weight, targets, None, cap)[0] * valid

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, valid = ctx.saved_tensors
        _, grad_hidden, grad_weight = _losses(hidden, weight, targets, grad * valid, ctx.cap)
        return grad_hidden, grad_weight, None, None, None


def _fake_losses(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    upstream: Tensor | None,
    cap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    losses = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
    if upstream is None:
        return losses, hidden.new_empty(0), weight.new_empty(0)
    return losses, hidden.new_empty(hidden.shape), weight.new_empty(weight.shape)


@opaque("triton_linear_cross_entropy", _fake_losses)
def _losses(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    upstream: Tensor | None,
    cap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses `(N,)`, and the gradients of hidden and weight when the losses have the gradients
    `upstream` `(N,)` (empty tensors when there is no `upstream`)."""
    losses, grad_hidden, grad_weight = _fake_losses(hidden, weight, targets, upstream, cap)
    tokens, vocabulary = hidden.shape[0], weight.shape[0]
    if not tokens:
        return losses, grad_hidden, grad_weight.zero_()
    hidden, head = hidden.contiguous(), weight.to(hidden.dtype).contiguous()
    chunk = max(MIN_CHUNK, BUFFER_BYTES // (vocabulary * hidden.element_size()))
    buffer = hidden.new_empty(min(chunk, tokens), vocabulary)
    total: Tensor | None = None
    with full_precision(hidden.device):
        for start in range(0, tokens, chunk):
            part = slice(start, min(start + chunk, tokens))
            logits = buffer[: part.stop - part.start]
            scale = None if upstream is None else upstream[part].float().contiguous()
            _turn(losses[part], logits, hidden[part], head, targets[part], scale, cap)
            if upstream is not None:
                torch.mm(logits, head, out=grad_hidden[part])
                update = logits.T @ hidden[part]
                total = update.float() if total is None else total.add_(update)
    return losses, grad_hidden, grad_weight if total is None else total.to(weight.dtype)


def _turn(
    losses: Tensor,
    logits: Tensor,
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    upstream: Tensor | None,
    cap: float | None,
) -> None:
    """Fills `losses`, and `logits` with their gradients if there is an `upstream` one."""
    exact = torch.empty_like(losses)

    def start_targets(config: Config) -> None:
        target_logits[(len(hidden),)](
            hidden, head, targets, exact, hidden.stride(0), head.stride(0),
            D=hidden.shape[1], **config,
        )  # fmt: skip

    launch("target_logits", "*", hidden, (hidden.shape[1],), start_targets)
    torch.addmm(exact.to(hidden.dtype)[:, None], hidden, head.T, beta=-1, out=logits)

    def start_losses(config: Config) -> None:
        losses_and_gradients[(len(hidden),)](
            logits, exact, targets, upstream, losses, logits.shape[1], cap, **config
        )

    launch("cross_entropy_losses", "*", logits, (), start_losses)


def ahead_of_time() -> list[Compilation]:
    """A model of 2,048 channels in bfloat16, with and without gradients, with and without a cap;
    then with both in float32."""
    types = {"targets": "*i64", "logits": "*fp32", "hidden_stride": "i32", "weight_stride": "i32"}
    strides = ("hidden_stride", "weight_stride")
    listed = []
    for kind in ("*bf16", "*fp32"):
        here = types | {"hidden": kind, "weight": kind}
        listed.append(
            Compilation("target_logits", target_logits, here, {"D": 2048}, multiples=strides)
        )
    types = {"targets": "*i64", "vocabulary": "i32", "cap": "fp32"}
    types |= dict.fromkeys(("exact", "upstream", "losses"), "*fp32")
    forms = ({"cap": None}, {"cap": None, "upstream": None}, {}, {"upstream": None})
    for kind, constants in (*(("*bf16", form) for form in forms), ("*fp32", {})):
        name, here = "cross_entropy_losses", types | {"logits": kind}
        listed.append(
            Compilation(name, losses_and_gradients, here, constants, multiples=("vocabulary",))
        )
    return listed
