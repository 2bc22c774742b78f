"""Matrix products in float32 on a CPU by oneDNN, where torch itself calls MKL: on an AMD processor
MKL takes about twice as long."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rondo.kernels.tiles import has_numbers

LEAST = 2**21
"""Multiplications of a product from which the call is worth it."""


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """`x Wᵀ` `(.., out)` for x `(.., in)` and W `(out, in)`, differentiable as often as is asked
    for; `torch.nn.functional.linear` where oneDNN does not serve."""
    if x.dim() > 1 and _is_worth_it(x, weight):
        return _Linear.apply(x, weight)
    return F.linear(x, weight)


def batched_product(a: Tensor, b: Tensor) -> Tensor:
    """`a bᵀ` `(H, m, n)` for a `(H, m, k)` and b `(H, n, k)`, transposed in memory or not; to be
    used where no gradient is asked for."""
    if len(a) and _is_worth_it(a[0], b[0]):
        return torch.stack([_product(x, y) for x, y in zip(a, b, strict=True)])
    return a @ b.mT


def _product(a: Tensor, b: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise.default(_dense(a), _dense(b), None, "none", [], "")


def _dense(x: Tensor) -> Tensor:
    """`x` without gaps in memory: oneDNN takes a hundred times as long with them."""
    return x if x.is_contiguous() or x.mT.is_contiguous() else x.contiguous()


def _is_worth_it(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN takes these as they are, and is faster."""
    return (
        type(x) is Tensor
        and type(weight) in (Tensor, nn.Parameter)
        and x.dtype == weight.dtype == torch.float32
        and x.is_cpu
        and x.numel() * len(weight) >= LEAST
        and weight.shape[1] == x.shape[-1]
        and has_numbers()
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkldnn.is_available()
        and bool(torch.backends.mkldnn.enabled)
    )


class _Linear(torch.autograd.Function):
    """`linear` by oneDNN, and its gradients, which are such products again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x.flatten(0, -2), weight).unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        at_x = at_weight = None
        if ctx.needs_input_grad[0]:
            at_x = linear(grad, weight.mT)
        if ctx.needs_input_grad[1]:
            # The wider side last: oneDNN is faster so. An optimizer wants what its weight is.
            rows, outs = x.flatten(0, -2), grad.flatten(0, -2)
            at_weight = linear(rows.mT, outs.mT).mT.contiguous()
        return at_x, at_weight
