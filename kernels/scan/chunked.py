"""The linear scan in chunks: all chunks step together, then carry states across their borders.

Within a chunk, states and running products of a are found as if the state before it were 0; the
states at the borders follow, and every position then adds product times incoming state. Nothing is
divided, so factors of 0 and of either sign are fine.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rondo.kernels.segments import document_starts

# With this many independent recurrences one position is enough work for a step, and chunks would
# only add passes over memory.
WIDE = 8192


def linear_scan(
    a: Tensor, b: Tensor, initial_state: Tensor | None, segment_ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The chunked form; see the package for the meaning of the arguments."""
    batch, time = b.shape[:2]
    first = None if initial_state is None else initial_state.reshape(batch, -1)
    a, flat = (x.reshape(batch, time, -1) for x in (a, b))
    if segment_ids is not None:
        a = a.masked_fill(document_starts(segment_ids).unsqueeze(-1), 0.0)
    h, last = LinearScan.apply(a, flat, first)
    return h.view(b.shape), last.view(b[:, 0].shape)


def summarize(a: Tensor, b: Tensor, segment_ids: Tensor | None) -> tuple[Tensor, Tensor]:
    """The product of the factors and the state from zero, `(B, ...)`."""
    _, state = linear_scan(a, b, None, segment_ids)
    _, transition = linear_scan(a, torch.zeros_like(b), torch.ones_like(b[:, 0]), segment_ids)
    return transition, state


class LinearScan(torch.autograd.Function):
    """`(a, b, initial_state or None)` -> `(h, last)` for a and b of shape `(B, T, W)`."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        a, b, first = arguments
        states = scan(a, b, first, False)
        h = states.to(b.dtype)
        ctx.save_for_backward(a, h, first)
        ctx.set_materialize_grads(False)
        return h, states[:, -1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        """The adjoint is the same recurrence backwards: `dh_t += a_{t+1} * dh_{t+1}`."""
        (a, h, first), (dh, dlast) = ctx.saved_tensors, grad_outputs
        states = scan(a, torch.zeros_like(h) if dh is None else dh, dlast, True)
        da = torch.empty_like(a)
        da[:, 1:].copy_(states[:, 1:] * h[:, :-1])
        if first is None:
            da[:, 0].zero_()
            return da, states.to(h.dtype), None
        da[:, 0].copy_(states[:, 0] * first)
        return da, states.to(h.dtype), (states[:, 0] * a[:, 0]).to(first.dtype)


@torch.library.custom_op("rondo::linear_scan", mutates_args=())
def scan(a: Tensor, b: Tensor, first: Tensor | None, reverse: bool) -> Tensor:
    """`x_t = a_t * x_{t-1} + b_t` with `first` before position 0, or, in reverse,
    `x_t = a_{t+1} * x_{t+1} + b_t` with `first` added to the last position.

    `(B, T, W)` tensors to a `(B, T, W)` one in the accumulation dtype. An operator of its own so
    that a compiler does not unroll it.
    """
    batch, time, width = b.shape
    accumulate = torch.promote_types(b.dtype, torch.float32)
    chunks = 1 if batch * width >= WIDE else math.isqrt(time)
    chunk = -(-time // chunks)
    chunks = -(-time // chunk)
    x = torch.empty(batch, chunks * chunk, width, dtype=accumulate, device=b.device)
    x[:, :time].copy_(b)
    x[:, time:].zero_()
    if first is not None and reverse:
        x[:, time - 1].add_(first)
    elif first is not None:
        x[:, 0].addcmul_(a[:, 0].to(accumulate), first.to(accumulate))
    if chunks == 1:
        factors = a.to(accumulate).unbind(1)
        _steps(x.unbind(1), (*factors[1:], factors[0]) if reverse else factors, reverse)
        return x
    products = torch.zeros_like(x)
    products[:, : time - reverse].copy_(a[:, 1:] if reverse else a)
    x, products = (y.view(batch, chunks, chunk, width) for y in (x, products))
    _steps(x.unbind(2), products.unbind(2), reverse, products=True)
    _across(x, products, reverse)
    return x.view(batch, -1, width)[:, :time].contiguous()


@scan.register_fake
def _(a: Tensor, b: Tensor, first: Tensor | None, reverse: bool) -> Tensor:
    return torch.empty_like(
        b, dtype=torch.promote_types(b.dtype, torch.float32), memory_format=torch.contiguous_format
    )


def _steps(
    states: Sequence[Tensor], factors: Sequence[Tensor], reverse: bool, products: bool = False
) -> None:
    """Scans `states` from zero, in place; with `products`, turns `factors` into their running
    products on the way."""
    order = range(len(states))
    for previous, t in itertools.pairwise(reversed(order) if reverse else order):
        states[t].addcmul_(factors[t], states[previous])
        if products:
            factors[t].mul_(factors[previous])


def _across(x: Tensor, products: Tensor, reverse: bool) -> None:
    """Adds to every chunk of `(B, N, C, W)`, in place, what the state at its border brings."""
    early, late = slice(None, -1), slice(1, None)
    edge, inner, outer = (0, early, late) if reverse else (-1, late, early)
    borders = x[:, :, edge].clone()
    _steps(borders.unbind(1), products[:, :, edge].unbind(1), reverse)
    x[:, inner].addcmul_(products[:, inner], borders[:, outer].unsqueeze(2))
