"""Fast weights row by row, chunk by chunk, the gradient token by token."""

from __future__ import annotations

import torch
from torch import Tensor

from rondo.kernels.fast_weights.inner import apply_weights, update_weights
from rondo.kernels.fast_weights.state import FastWeights, FastWeightState, first_state


def _token_gradient(weights: FastWeights, k: Tensor, v: Tensor, rates: Tensor) -> FastWeights:
    """Gradient of `rate f(k) . v` of one token, `(1, H, .)`, for each matrix with its rate."""
    a, u = (torch.einsum("bhfk,bhk->bhf", w, k) for w in (weights.gate, weights.up))
    d = torch.einsum("bhvf,bhv->bhf", weights.down, v)  # gradient of the hidden layer
    s = torch.sigmoid(a)
    outers = (
        torch.einsum("bhf,bhk->bhfk", d * u * (s + a * s * (1 - s)), k),
        torch.einsum("bhf,bhk->bhfk", d * a * s, k),
        torch.einsum("bhv,bhf->bhvf", v, a * s * u),
    )
    pairs = zip(rates.unbind(-1), outers, strict=True)
    return FastWeights(*(rate[..., None, None] * outer for rate, outer in pairs))


def _next_border(ids: list[int], start: int, room: int) -> int:
    """Where the chunk that position `start` lies in ends, with `room` tokens left in it."""
    stop = start + 1
    while stop < len(ids) and ids[stop] == ids[start] and stop - start < room:
        stop += 1
    return stop


def _row(
    tokens: tuple[Tensor, ...],
    initial: FastWeights,
    momentum: Tensor | None,
    state: FastWeightState,
    ids: list[int],
    options: tuple[str, str, int],
) -> tuple[Tensor, FastWeightState]:
    """One row, `(1, T, H, .)`."""
    q, k, v, rates = tokens
    update, order, chunk = options
    weights, gradient, buffer = state.matrices(k.shape[-1])
    total, count = state.momentum_sum, int(state.count)
    zero = gradient.map(torch.zeros_like)
    nothing = None if total is None else torch.zeros_like(total)
    outputs, start = [], 0
    while start < len(ids):
        if start > 0 and ids[start] != ids[start - 1]:
            weights, gradient, count = initial.map(lambda w: w.unsqueeze(0)), zero, 0
            buffer, total = None if buffer is None else zero, nothing
        part = slice(start, _next_border(ids, start, chunk - count))
        for t in range(start, part.stop):
            token = _token_gradient(weights, k[:, t], v[:, t], rates[:, t])
            gradient, count = gradient.map(torch.add, token), count + 1
        mean = None
        if momentum is not None and total is not None:
            total = total + momentum[:, part].sum(1)
            mean = total / count
        after = update_weights(weights, gradient, initial, buffer, mean, update)
        reader = weights if order == "apply_then_update" else after[0]
        outputs.append(apply_weights(reader, q[:, part].transpose(1, 2)).transpose(1, 2))
        if count == chunk:
            (weights, buffer), gradient, count = after, zero, 0
            total = nothing
        start = part.stop
    packed = None if buffer is None else buffer.pack()
    left = torch.full_like(state.count, count)
    state = FastWeightState(weights.pack(), gradient.pack(), left, packed, total)
    return torch.cat(outputs, dim=1), state


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    learning_rates: Tensor,
    initial: FastWeights,
    momentum: Tensor | None,
    state: FastWeightState | None,
    segment_ids: Tensor | None,
    options: tuple[str, str, int],
) -> tuple[Tensor, FastWeightState]:
    """Checked arguments of `fast_weights`; options: update, order, chunk_size."""
    wide = learning_rates.dtype
    if state is None:
        state = first_state(initial, v.shape[0], momentum is not None)
    rows = []
    for b in range(v.shape[0]):
        row = slice(b, b + 1)
        tokens = tuple(x[row].to(wide) for x in (q, k, v, learning_rates))
        ids = [0] * v.shape[1] if segment_ids is None else segment_ids[b].tolist()
        beta = None if momentum is None else momentum[row]
        rows.append(_row(tokens, initial, beta, state.row(b), ids, options))
    outputs, states = zip(*rows, strict=True)
    return torch.cat(outputs).to(v.dtype), FastWeightState.join(states)
