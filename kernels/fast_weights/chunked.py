"""Fast weights with matrix products over all rows and heads, one chunk after the other."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from rondo.kernels.fast_weights.inner import (
    TORCH,
    Passes,
    apply_weights,
    gradient_sum,
    update_weights,
)
from rondo.kernels.fast_weights.layout import Layout, make_layout
from rondo.kernels.fast_weights.newton_schulz import newton_schulz
from rondo.kernels.fast_weights.state import FastWeights, FastWeightState, first_state


class Share(NamedTuple):
    """Which tokens one of `size` ranks has: the positions `rank`, `rank + size`, ... of every row.
    So each has its part of every chunk, wherever documents begin."""

    rank: int
    size: int
    total: Callable[[Tensor], Tensor]
    """The sum over ranks, whose backward pass is a sum over ranks."""
    divide: Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]
    """A function of each matrix of a `(B, H, ., .)` that all ranks have alike: each computes some,
    all get all."""


class _Chunk(NamedTuple):
    """Tokens in one slot of a layout; B rows, W tokens in a slot."""

    q: Tensor  # (B, H, W, K): of the tokens that read the weights of the slot
    k: Tensor  # (B, H, W, K)
    v: Tensor  # (B, H, W, V)
    rates: Tensor  # (B, H, W, 3): 0 where there is no token
    momentum: Tensor | None  # (B, H): mean over the chunk
    momentum_sum: Tensor | None  # (B, H)


class _Inner(NamedTuple):
    """What the inner loop trains, `(B, H, ...)`."""

    weights: FastWeights
    buffer: FastWeights | None

    def where(self, rows: Tensor, other: _Inner) -> _Inner:
        """Itself in the rows where `(B,)` is true, else `other`."""
        mask = rows[:, None, None, None]
        weights = self.weights.map(lambda x, y: torch.where(mask, x, y), other.weights)
        if self.buffer is None or other.buffer is None:
            return _Inner(weights, None)
        buffer = self.buffer.map(lambda x, y: torch.where(mask, x, y), other.buffer)
        return _Inner(weights, buffer)


def chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    learning_rates: Tensor,
    initial: FastWeights,
    momentum: Tensor | None,
    state: FastWeightState | None,
    segment_ids: Tensor | None,
    options: tuple[str, str, int],
    share: Share | None = None,
    passes: Passes = TORCH,
) -> tuple[Tensor, FastWeightState]:
    """Checked arguments of `fast_weights`; options: update, order, chunk_size."""
    update, order, chunk = options
    apply_first = order == "apply_then_update"
    count = None if state is None else state.count
    shape = v.shape[0], v.shape[1] * (1 if share is None else share.size)
    layout = make_layout(shape, chunk, apply_first, segment_ids, count, v.device)
    if share is not None:
        layout = layout.share(share.rank, share.size)
    if state is None:
        state = first_state(initial, v.shape[0], momentum is not None)
    chunks = _gather(q, k, v, learning_rates, momentum, state, layout, share)
    slots, state = _train(chunks, initial, state, layout, share, update, apply_first, passes)
    o = _scatter(slots, layout)
    if layout.unread is not None:
        first = apply_weights(initial, q.transpose(1, 2), passes).transpose(1, 2)
        o = torch.where(layout.unread[..., None, None], first, o)
    if not layout.learns():
        # Else gradients would be missing, on some ranks that reduce them and not on others.
        idle = (x for x in (k, v, learning_rates, momentum, *initial) if x is not None)
        nothing = sum(x.flatten()[0].to(o.dtype) for x in idle)
        o = torch.where(torch.zeros((), dtype=torch.bool, device=o.device), nothing, o)
    return o, state


def _gather(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    learning_rates: Tensor,
    momentum: Tensor | None,
    state: FastWeightState,
    layout: Layout,
    share: Share | None,
) -> list[_Chunk]:
    write = layout.write
    mean = total = (None,) * len(write.index)
    if momentum is not None and state.momentum_sum is not None:
        sums = write.take(momentum.unsqueeze(-1)).sum((-2, -1))
        if share is not None:
            sums = share.total(sums)
        if layout.carried is not None:
            sums = sums + torch.where(layout.carried.unsqueeze(-1), state.momentum_sum, 0.0)
        total = sums.unbind()
        mean = (sums / layout.count.clamp_min(1).unsqueeze(-1)).unbind()
    # Indexed one by one, every slot would get a gradient as large as all of them together.
    slots = layout.read.take(q), *(write.take(x) for x in (k, v, learning_rates))
    tokens = (x.unbind() for x in slots)
    return [_Chunk(*parts) for parts in zip(*tokens, mean, total, strict=True)]


def _scatter(slots: Tensor, layout: Layout) -> Tensor:
    """Outputs by slot `(S, B, H, W, V)` to `(B, T, H, V)`."""
    by_row = slots.permute(1, 0, 3, 2, 4).flatten(1, 2)
    rows = torch.arange(by_row.shape[0], device=slots.device)[:, None]
    index = (layout.source + rows * by_row.shape[1]).flatten()
    return by_row.flatten(0, 1).index_select(0, index).unflatten(0, layout.source.shape)


def _train(
    chunks: list[_Chunk],
    initial: FastWeights,
    state: FastWeightState,
    layout: Layout,
    share: Share | None,
    update: str,
    apply_first: bool,
    passes: Passes,
) -> tuple[Tensor, FastWeightState]:
    """The inner training loop: outputs `(S, B, H, W, V)` by slot, and the state it ends in."""
    weights, carried, buffer = state.matrices(chunks[0].k.shape[-1])
    inner, outputs, last = _Inner(weights, buffer), [], len(chunks) - 1
    fresh = _Inner(initial, None if buffer is None else buffer.map(torch.zeros_like))
    gradient, orthogonalise = carried, newton_schulz
    if share is not None:
        orthogonalise = functools.partial(share.divide, newton_schulz)
    for n, chunk in enumerate(chunks):
        if apply_first:
            outputs.append(_read(inner.weights, chunk, layout.read.busy[n], passes))
        if layout.fresh is not None:
            inner = fresh.where(layout.fresh[n], inner)
        gradient = _gradient(inner.weights, carried, chunk, layout, share, n, passes)
        after = inner
        if layout.write.busy[n] and not (apply_first and n == last):
            args = inner.weights, gradient, initial, inner.buffer, chunk.momentum, update
            after = _Inner(*update_weights(*args, orthogonalise, passes))
        if not apply_first:
            outputs.append(_read(after.weights, chunk, layout.read.busy[n], passes))
        if n < last:
            inner = after if layout.full is None else after.where(layout.full[n], inner)
    return torch.stack(outputs), FastWeightState(
        inner.weights.pack(),
        gradient.pack(),
        layout.count[last],
        None if inner.buffer is None else inner.buffer.pack(),
        chunks[last].momentum_sum,
    )


def _read(weights: FastWeights, chunk: _Chunk, busy: bool, passes: Passes) -> Tensor:
    return apply_weights(weights, chunk.q, passes) if busy else torch.zeros_like(chunk.v)


def _gradient(
    weights: FastWeights,
    carried: FastWeights,
    chunk: _Chunk,
    layout: Layout,
    share: Share | None,
    n: int,
    passes: Passes,
) -> FastWeights:
    """Summed over the chunk of slot n, with what its tokens before the row have left."""
    if not layout.write.busy[n]:
        return weights.map(torch.zeros_like)
    gradient = gradient_sum(weights, chunk.k, chunk.v, chunk.rates, passes)
    if share is not None:
        gradient = FastWeights.unpack(share.total(gradient.pack()), chunk.k.shape[-1])
    if layout.carried is None:
        return gradient
    mask = layout.carried[n, :, None, None, None]
    return gradient.map(lambda g, before: g + torch.where(mask, before, 0.0), carried)
