"""Matrix products in float32 on a CPU by oneDNN, where torch itself calls MKL: on an AMD processor
MKL takes about twice as long."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import flop_registry, register_flop_formula

from rondo.kernels.tiles import has_numbers

LEAST = 2**21
"""Multiplications of a product from which the call is worth it."""


def count_flops(namespace: Any, name: str, formula: Callable[..., int]) -> None:
    """Has torch's `FlopCounterMode` count an operator of torch that it does not know, where there
    is one: `formula` takes the operator's arguments, shapes in place of tensors."""
    operator = getattr(namespace, name, None)
    if operator is not None and operator not in flop_registry:
        register_flop_formula(operator)(formula)


def _flops(x: torch.Size, weight: torch.Size, *_: Any, **options: Any) -> int:
    """What the counter says of torch's own product of these shapes."""
    return 2 * math.prod(x) * weight[0]


count_flops(torch.ops.mkldnn, "_linear_pointwise", _flops)


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
    """`linear` by oneDNN, and its derivatives, which are such products again."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor) -> Tensor:
        return _product(x.flatten(0, -2), weight).unflatten(0, x.shape[:-1])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

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

    @staticmethod
    def jvp(ctx: Any, at_x: Tensor | None, at_weight: Tensor | None) -> Tensor:
        x, weight = ctx.saved_tensors
        if at_x is None or at_weight is None:
            return linear(x if at_x is None else at_x, weight if at_weight is None else at_weight)
        return linear(at_x, weight) + linear(x, at_weight)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, int | None], x: Tensor, weight: Tensor
    ) -> tuple[Tensor, int]:
        """Of one weight for all it is one product; one each goes to torch's batched one."""
        at_x, at_weight = in_dims
        x = x.expand(info.batch_size, *x.shape) if at_x is None else x.movedim(at_x, 0)
        if at_weight is None:
            return linear(x, weight), 0
        return torch.einsum("n...i,noi->n...o", x, weight.movedim(at_weight, 0)), 0
