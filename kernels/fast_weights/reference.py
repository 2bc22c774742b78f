"""Fast weights row by row and chunk by chunk, the inner gradient left to autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from rondo.kernels.fast_weights.inner import apply_weights, update_weights
from rondo.kernels.fast_weights.state import FastWeights, FastWeightState, first_state


def _inner_gradient(weights: FastWeights, k: Tensor, v: Tensor, rates: Tensor) -> FastWeights:
    """Gradient of the weighted inner products of `(1, C, H, .)` tokens, one matrix at a time."""

    def gain(gate: Tensor, up: Tensor, down: Tensor, rate: Tensor) -> Tensor:
        a, u = (torch.einsum("bhfk,bchk->bchf", w, k) for w in (gate, up))
        read = torch.einsum("bhvf,bchf->bchv", down, torch.nn.functional.silu(a) * u)
        return (rate * (read * v).sum(-1)).sum()

    return FastWeights(
        *(torch.func.grad(gain, argnums=j)(*weights, rates[..., j]) for j in range(3))
    )


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
        new = _inner_gradient(weights, k[:, part], v[:, part], rates[:, part])
        gradient, count = gradient.map(torch.add, new), count + part.stop - start
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
