"""The linear scan in chunks: all chunks step together, then carry states across their borders.

Within a chunk, states and running products of a are found as if the state before it were 0; the
states at the borders follow, and every position then adds product times incoming state. Nothing is
divided, so factors of 0 and of either sign are fine. The last border says what the row does to any
state: ranks learn of the state before their stretch between the two steps (`chunked_stretch.py`).
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
    first = None if initial_state is None else initial_state.reshape(b.shape[0], -1)
    h, last = LinearScan.apply(*operands(a, b, segment_ids), first)
    return h.view(b.shape), last.view(b[:, 0].shape)


def operands(a: Tensor, b: Tensor, segment_ids: Tensor | None) -> tuple[Tensor, Tensor]:
    """Both as `(B, T, W)`; factors are 0 where documents start."""
    a, b = (x.reshape(*b.shape[:2], -1) for x in (a, b))
    if segment_ids is not None:
        a = a.masked_fill(document_starts(segment_ids).unsqueeze(-1), 0.0)
    return a, b


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
        dfirst = None if first is None else (states[:, 0] * a[:, 0]).to(first.dtype)
        return *gradients(states, a, h, first), dfirst


def gradients(states: Tensor, a: Tensor, h: Tensor, first: Tensor | None) -> tuple[Tensor, Tensor]:
    """Of a and b, from the states of the adjoint and what they meet."""
    da = torch.empty_like(a)
    da[:, 1:].copy_(states[:, 1:] * h[:, :-1])
    if first is None:
        da[:, 0].zero_()
    else:
        da[:, 0].copy_(states[:, 0] * first)
    return da, states.to(h.dtype)


@torch.library.custom_op("rondo::linear_scan", mutates_args=())
def scan(a: Tensor, b: Tensor, first: Tensor | None, reverse: bool) -> Tensor:
    """`x_t = a_t * x_{t-1} + b_t` with `first` before position 0, or, in reverse,
    `x_t = a_{t+1} * x_{t+1} + b_t` with `first` added to the last position.

    `(B, T, W)` tensors to a `(B, T, W)` one in the accumulation dtype. An operator of its own so
    that a compiler does not unroll it.
    """
    batch, time, width = b.shape
    if batch * width < WIDE and time > 3:
        states, products = _local(a, b, reverse)
        incoming = _incoming(states, products, first, reverse)
        states.addcmul_(products, incoming.unsqueeze(2))
        return states.flatten(1, 2)[:, :time].contiguous()
    accumulate = torch.promote_types(b.dtype, torch.float32)
    x = b.to(accumulate, copy=True, memory_format=torch.contiguous_format)
    if first is not None and reverse:
        x[:, -1].add_(first)
    elif first is not None:
        x[:, 0].addcmul_(a[:, 0].to(accumulate), first.to(accumulate))
    factors = a.to(accumulate).unbind(1)
    _steps(x.unbind(1), (*factors[1:], factors[0]) if reverse else factors, reverse)
    return x


@scan.register_fake
def _(a: Tensor, b: Tensor, first: Tensor | None, reverse: bool) -> Tensor:
    return _like(b, b.shape)


@torch.library.custom_op("rondo::linear_scan_local", mutates_args=())
def local(a: Tensor, b: Tensor, reverse: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All of `scan` that needs no `first`.

    Returns:
        `(B, N, C, W)`, positions in N chunks of C: the states from zero of each chunk, and the
        running products of its factors; `(B, W)`: the product of all factors, and the state from
        zero at the end of the row (in reverse: at position 0).
    """
    states, products = _local(a, b, reverse)
    edge = 0 if reverse else -1
    totals, factors = (x[:, :, edge].clone() for x in (states, products))
    _steps(totals.unbind(1), factors.unbind(1), reverse, products=True)
    return states, products, factors[:, edge].clone(), totals[:, edge].clone()


@local.register_fake
def _(a: Tensor, b: Tensor, reverse: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    states, products = _in_chunks(b)
    return states, products, _like(b, b[:, 0].shape), _like(b, b[:, 0].shape)


@torch.library.custom_op("rondo::linear_scan_enter", mutates_args=())
def enter(
    states: Tensor, products: Tensor, first: Tensor | None, time: int, reverse: bool
) -> Tensor:
    """What `scan` gives, from the states and products of `local`."""
    incoming = _incoming(states, products, first, reverse)
    x = torch.addcmul(states, products, incoming.unsqueeze(2))
    return x.flatten(1, 2)[:, :time].contiguous()


@enter.register_fake
def _(states: Tensor, products: Tensor, first: Tensor | None, time: int, reverse: bool) -> Tensor:
    return states.new_empty(states.shape[0], time, states.shape[3])


def _like(b: Tensor, shape: Sequence[int]) -> Tensor:
    """Without numbers, in the dtype of sums."""
    return b.new_empty(shape, dtype=torch.promote_types(b.dtype, torch.float32))


def _in_chunks(b: Tensor) -> tuple[Tensor, Tensor]:
    """Two `(B, N, C, W)` without numbers, N and C about √T."""
    batch, time, width = b.shape
    chunk = -(-time // math.isqrt(time))
    shape = batch, -(-time // chunk), chunk, width
    return _like(b, shape), _like(b, shape)


def _local(a: Tensor, b: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
    """The states from zero of every chunk and the running products of its factors."""
    states, products = _in_chunks(b)
    flat, factors, last = states.flatten(1, 2), products.flatten(1, 2), b.shape[1] - reverse
    flat[:, : b.shape[1]].copy_(b)
    flat[:, b.shape[1] :].zero_()
    factors[:, :last].copy_(a[:, 1:] if reverse else a)
    factors[:, last:].fill_(1.0)  # what enters behind the row reaches its last position as it is
    _steps(states.unbind(2), products.unbind(2), reverse, products=True)
    return states, products


def _incoming(states: Tensor, products: Tensor, first: Tensor | None, reverse: bool) -> Tensor:
    """The state that enters every chunk, `(B, N, W)`."""
    edge = 0 if reverse else -1
    incoming = states.new_empty(states[:, :, edge].shape)
    entering = incoming.unbind(1)
    ends, factors = (x[:, :, edge].unbind(1) for x in (states, products))
    order = list(range(len(entering)))[:: -1 if reverse else 1]
    if first is None:
        entering[order[0]].zero_()
    else:
        entering[order[0]].copy_(first)
    for n, following in itertools.pairwise(order):
        torch.addcmul(ends[n], factors[n], entering[n], out=entering[following])
    return incoming


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
