"""Backward pass of the chunked gated delta rule; see `chunked.py` for the names.

What was written is `V' = beta v + erase S + N V'`, what is read `O = q S + P V'`. With `d` the
gradient of O, or for the erase keys `A^T dV'`, both kinds of reader have the same backward pass:
`d S^T` for themselves and `d V'^T` for their products with the keys.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rondo.kernels.delta_rule.gates import HeadGates, dot, scaled
from rondo.kernels.delta_rule.key_gates import KeyGates
from rondo.kernels.delta_rule.layout import from_chunks, to_chunks
from rondo.kernels.delta_rule.operands import Operands, make_gates, make_operands


class Saved(NamedTuple):
    """Inputs of the operator, and what the forward pass keeps.

    Besides the inputs 3 C + V + K V / C numbers a token and head (2 C without a gate, which also
    needs no `pairs`); W and all that is scaled is made again from them.
    """

    q: Tensor | None
    k: Tensor
    v: Tensor
    beta: Tensor
    log_decay: Tensor | None
    segment_ids: Tensor | None
    pairs: Tensor | None
    inverse: Tensor  # A
    written: Tensor  # V'
    states: Tensor  # before every chunk
    products: list[Tensor]  # P unless there are no queries, N


def backward(
    saved: Saved, scale: float, chunk: int, d_o: Tensor, d_state: Tensor
) -> tuple[Tensor | None, Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """Gradients of q, k, v, beta, log_decay and the initial state."""
    q, k, v, beta, log_decay = saved[:5]
    batch, heads, dtype = v.shape[0], v.shape[2], v.dtype
    gates = make_gates(log_decay, saved.segment_ids, saved.pairs, chunk, v)
    x = make_operands(q, k, beta, gates, scale, chunk, dtype)
    d_outputs = [] if q is None else [to_chunks(d_o, chunk)]
    d_written, d_states, d_first = _through_states(saved, x, d_outputs, d_state)
    written, states = saved.written.to(dtype), saved.states.to(dtype)

    d_values = torch.bmm(saved.inverse.mT, d_written)
    d_readings = [*d_outputs, d_values]
    d_from_start = [torch.bmm(d, states.mT) for d in d_readings]
    d_products = [torch.bmm(d, written.mT) for d in d_readings]
    d_products[-1].tril_(-1)
    d_to_end = torch.bmm(written, d_states.mT)
    sums = ()
    if log_decay is not None:
        sums = _gate_sums(gates, x, d_from_start, d_to_end, states, d_states)
    d_readers, d_k, d_g = gates.backward(d_products, saved.products, x.readers, x.keys, sums)
    for d, s in zip(d_readers, d_from_start, strict=True):
        _add_scaled(d, s, gates.from_start)
    d_erase = d_readers[-1]
    _add_scaled(d_k, d_to_end, gates.to_end).addcmul_(d_erase, x.beta, value=-1)
    d_beta = dot(d_values, to_chunks(v, chunk)) - dot(d_erase, x.keys)
    d_values.mul_(x.beta)

    d_q = None
    if q is not None:
        d_q = from_chunks(d_readers[0].mul_(scale), batch, q.shape[2:-1]).to(q.dtype)
    if d_g is not None and log_decay is not None:
        d_g = from_chunks(d_g, batch, (heads,)).to(log_decay.dtype).view_as(log_decay)
    return (
        d_q,
        from_chunks(d_k, batch, k.shape[2:-1]).to(k.dtype),
        from_chunks(d_values, batch, (heads,)),
        from_chunks(d_beta, batch, (heads,)).squeeze(-1).to(beta.dtype),
        d_g,
        d_first.unflatten(0, (batch, heads)),
    )


def _through_states(
    saved: Saved, x: Operands, d_outputs: list[Tensor], d_state: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of V', of the states after every chunk, and of the first state."""
    chain, dtype = saved.states.dtype, x.keys.dtype
    d_read = None
    if d_outputs:
        d_written = torch.bmm(saved.products[0].mT, d_outputs[0])
        d_read = torch.bmm(x.from_start[0].mT, d_outputs[0])
    else:
        d_written = torch.zeros_like(saved.written)
    w = torch.bmm(saved.inverse, x.from_start[-1]).to(chain)
    d_states, d_first = _retreat(
        w, d_written, d_read, x.to_end.to(chain), x.through, d_state.flatten(0, 1)
    )
    return d_written.to(dtype), d_states.to(dtype), d_first


def _retreat(
    w: Tensor,
    d_written: Tensor,
    d_read: Tensor | None,
    to_end: Tensor,
    through: Tensor | None,
    d_state: Tensor,
) -> tuple[Tensor, Tensor]:
    """The recurrence over chunks, backwards. Completes `d_written` in place.

    `d_read` is the gradient of the states from the outputs, if there are any.

    Returns the gradients of the states after every chunk, and of the first state.
    """
    rows, d_state = len(d_state), d_state.clone()
    d_states = w.new_empty(len(w), *d_state.shape[1:])
    decays = None if through is None else through.split(rows)
    reads = None if d_read is None else d_read.split(rows)
    steps = [x.split(rows) for x in (d_states, w.mT, d_written, to_end)]
    for n, (after, erase, d_rows, write) in reversed([*enumerate(zip(*steps, strict=True))]):
        d_rows.baddbmm_(write, after.copy_(d_state))
        if decays is not None:
            d_state.mul_(decays[n])
        if reads is not None:
            d_state.add_(reads[n])
        d_state.add_(torch.bmm(erase, d_rows))
    return d_states, d_state


def _gate_sums(
    gates: HeadGates | KeyGates,
    x: Operands,
    d_from_start: list[Tensor],
    d_to_end: Tensor,
    states: Tensor,
    d_states: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the sums of log decay from the start, to the end and through the chunk, from
    what passes through states."""
    start = gates.reduce(d_from_start[-1], x.from_start[-1])
    for d, r in zip(d_from_start[:-1], x.from_start[:-1], strict=True):
        start = start + gates.reduce(d, r)
    through = scaled(dot(states, d_states), x.through)
    return start, gates.reduce(d_to_end, x.to_end), through.mT


def _add_scaled(out: Tensor, x: Tensor, factor: Tensor | None) -> Tensor:
    return out.add_(x) if factor is None else out.addcmul_(x, factor)
