"""Gated delta rule in chunks of matrix products, with a backward pass written out by hand.

In a chunk of C tokens with decayed keys the C rank-one updates `(I - beta k k^T)` multiply to
`I - K^T W` (the WY form of a product of Householder-like factors; DeltaNet, arXiv 2406.06484,
Gated DeltaNet, arXiv 2412.06464), W and the matching U come from one triangular inverse, and what
is left to do token after token is done chunk after chunk. Written here with readers and writers
(see `gates.py`): the queries `q` read the state, and so do the erase keys `-beta k`.

    N  = erase . k  (decayed, strictly lower)          A = (I - N)^-1
    W  = A (erase from start)    U = A (beta v)        V' = U + W S      what is really written
    O  = (q from start) S + (q . k) V'                 S' = exp(G_C) S + (k to end)^T V'
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from rondo.kernels.delta_rule.gates import (
    HeadGates,
    add_matmul,
    dot,
    matmul,
    pair_factors,
    scaled,
    wide,
)
from rondo.kernels.delta_rule.key_gates import KeyGates
from rondo.kernels.delta_rule.layout import document_pairs, documents, from_chunks, to_chunks
from rondo.kernels.delta_rule.triangular import invert_unit_lower
from rondo.kernels.summary import MatrixSummary


class Operands(NamedTuple):
    """Chunked inputs of the matrix products, all `(N, B * H, C, .)`."""

    readers: list[Tensor]  # the scaled queries unless there are none, then -beta k
    keys: Tensor
    beta: Tensor  # (.., 1)
    from_start: list[Tensor]  # readers as they see the state before the chunk
    to_end: Tensor  # keys as they write to the state after the chunk


def _chunked_decay(log_decay: Tensor | None, chunk: int) -> Tensor | None:
    if log_decay is None:
        return None
    return to_chunks(log_decay if log_decay.dim() == 4 else log_decay.unsqueeze(-1), chunk)


def _pairs(
    log_decay: Tensor | None, segment_ids: Tensor | None, chunk: int, v: Tensor
) -> Tensor | None:
    same = None
    if segment_ids is not None:
        same = document_pairs(segment_ids, chunk, v.shape[2], v.dtype)
    decay = _chunked_decay(log_decay, chunk)
    if decay is not None and decay.shape[-1] > 1:
        return same
    return pair_factors(decay, same, v.dtype)


def _gates(
    log_decay: Tensor | None,
    segment_ids: Tensor | None,
    pairs: Tensor | None,
    chunk: int,
    v: Tensor,
) -> HeadGates | KeyGates:
    docs = None
    if segment_ids is not None:
        docs = documents(segment_ids, chunk, v.shape[2], v.dtype)
    decay = _chunked_decay(log_decay, chunk)
    if decay is not None and decay.shape[-1] > 1:
        return KeyGates(decay, docs, pairs, v.dtype)
    return HeadGates(decay, docs, pairs, v.dtype)


def _operands(
    q: Tensor | None,
    k: Tensor,
    beta: Tensor,
    gates: HeadGates | KeyGates,
    scale: float,
    chunk: int,
    dtype: torch.dtype,
) -> Operands:
    keys, beta = to_chunks(k.to(dtype), chunk), to_chunks(beta.to(dtype).unsqueeze(-1), chunk)
    readers = [keys * -beta]
    if q is not None:
        readers.insert(0, to_chunks(q.to(dtype), chunk) * scale)
    return Operands(
        readers,
        keys,
        beta,
        [scaled(r, gates.from_start) for r in readers],
        scaled(keys, gates.to_end),
    )


def _add(out: Tensor, x: Tensor, factor: Tensor | None) -> Tensor:
    return out.add_(x) if factor is None else out.addcmul_(x, factor)


def _advance(
    w: Tensor, u: Tensor, to_end: Tensor, through: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The recurrence over chunks. Turns `u` into V' in place.

    Returns the states before every chunk in the dtype of `w`, and the last state.
    """
    states = w.new_empty(*w.shape[:2], *state.shape[1:])
    state = state.clone()
    for n, (erase, written, write) in enumerate(zip(w, u, to_end.mT, strict=True)):
        before = states[n].copy_(state)
        written.baddbmm_(erase, before)
        if through is not None:
            state.mul_(through[n])
        state.add_(torch.bmm(write, written))
    return states, state


def _retreat(
    w: Tensor,
    d_written: Tensor,
    d_read: Tensor | None,
    to_end: Tensor,
    through: Tensor | None,
    d_state: Tensor,
) -> tuple[Tensor, Tensor]:
    """Backward pass of `_advance`: adds what comes through the states to `d_written` in place.

    Args:
        d_read: gradient of the states from the outputs, if there are any.

    Returns the gradients of the states after every chunk, and of the first state.
    """
    d_states = w.new_empty(*w.shape[:2], *d_state.shape[1:])
    d_state = d_state.clone()
    erase, d_rows = w.mT.unbind(), d_written.unbind()
    for n in reversed(range(len(d_rows))):
        after = d_states[n].copy_(d_state)
        d_rows[n].baddbmm_(to_end[n], after)
        if through is not None:
            d_state.mul_(through[n])
        if d_read is not None:
            d_state.add_(d_read[n])
        d_state.add_(torch.bmm(erase[n], d_rows[n]))
    return d_states, d_state


class ChunkedDelta(torch.autograd.Function):
    """`(o, state)`; `o` is empty when `q` is None, and the states then never leave float32.

    q, k: `(B, T, G, H / G, K)`; T is a multiple of `chunk`; the rest as for `gated_delta_rule`.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        q: Tensor | None,
        k: Tensor,
        v: Tensor,
        beta: Tensor,
        log_decay: Tensor | None,
        state: Tensor,
        segment_ids: Tensor | None,
        scale: float,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        batch, heads, dtype = v.shape[0], v.shape[2], v.dtype
        pairs = _pairs(log_decay, segment_ids, chunk, v)
        gates = _gates(log_decay, segment_ids, pairs, chunk, v)
        x = _operands(q, k, beta, gates, scale, chunk, dtype)
        products = gates.products(x.readers, x.keys)
        lower = products[-1].flatten(0, 1).to(wide(dtype))
        inverse = invert_unit_lower(lower).to(dtype).view_as(products[-1])
        chain = dtype if q is not None else wide(dtype)
        w = matmul(inverse, x.from_start[-1]).to(chain)
        written = matmul(inverse, to_chunks(v, chunk) * x.beta).to(chain)
        states, last = _advance(w, written, x.to_end.to(chain), gates.through, state.flatten(0, 1))
        o = v.new_empty(0)
        if q is not None:
            o = add_matmul(matmul(x.from_start[0], states), products[0], written)
            o = from_chunks(o, batch, (heads,))
        ctx.save_for_backward(
            q, k, v, beta, log_decay, segment_ids, pairs, inverse, written, states, *products
        )
        ctx.scale, ctx.chunk = scale, chunk
        return o, last.view_as(state)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, d_o: Tensor, d_state: Tensor) -> tuple[Tensor | None, ...]:
        with _full_precision(d_state.device):
            return _backward(ctx, d_o, d_state)


def _backward(ctx: FunctionCtx, d_o: Tensor, d_state: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, beta, log_decay, segment_ids, pairs, *saved = ctx.saved_tensors
    inverse, written, states, *products = saved
    batch, heads, dtype, chain = v.shape[0], v.shape[2], v.dtype, states.dtype
    gates = _gates(log_decay, segment_ids, pairs, ctx.chunk, v)
    x = _operands(q, k, beta, gates, ctx.scale, ctx.chunk, dtype)
    d_read, d_written = None, torch.zeros_like(written)
    if q is not None:
        d_o = to_chunks(d_o, ctx.chunk)
        d_written = matmul(products[0].mT, d_o)
        d_read = matmul(x.from_start[0].mT, d_o)
    w = matmul(inverse, x.from_start[-1]).to(chain)
    d_states, d_first = _retreat(
        w, d_written, d_read, x.to_end.to(chain), gates.through, d_state.flatten(0, 1)
    )
    d_written, d_states = d_written.to(dtype), d_states.to(dtype)
    written, states = written.to(dtype), states.to(dtype)

    # V' = beta v + erase S + N V': what a reader gets is S and V', so both kinds of reader
    # have the same backward pass.
    d_values = matmul(inverse.mT, d_written)
    d_readings = [d_values] if q is None else [d_o, d_values]
    d_from_start = [matmul(d, states.mT) for d in d_readings]
    d_products = [matmul(d, written.mT) for d in d_readings]
    d_products[-1].tril_(-1)
    d_to_end = matmul(written, d_states.mT)
    sums = None
    if log_decay is not None:
        start = gates.reduce(d_from_start[0], x.from_start[0])
        for d, r in zip(d_from_start[1:], x.from_start[1:], strict=True):
            start += gates.reduce(d, r)
        through = gates.through * dot(states, d_states)
        sums = (start, gates.reduce(d_to_end, x.to_end), through.mT)
    d_readers, d_k, d_g = gates.backward(d_products, products, x.readers, x.keys, sums)
    for d, s in zip(d_readers, d_from_start, strict=True):
        _add(d, s, gates.from_start)
    _add(d_k, d_to_end, gates.to_end)
    d_k.addcmul_(d_readers[-1], x.beta, value=-1)
    d_beta = dot(d_values, to_chunks(v, ctx.chunk)) - dot(d_readers[-1], x.keys)
    d_values.mul_(x.beta)
    d_q = None
    if q is not None:
        d_q = from_chunks(d_readers[0].mul_(ctx.scale), batch, q.shape[2:-1]).to(q.dtype)
    if d_g is not None:
        d_g = from_chunks(d_g, batch, (heads,)).to(log_decay.dtype).view_as(log_decay)
    return (
        d_q,
        from_chunks(d_k, batch, k.shape[2:-1]).to(k.dtype),
        from_chunks(d_values, batch, (heads,)),
        from_chunks(d_beta, batch, (heads,)).squeeze(-1).to(beta.dtype),
        d_g,
        d_first.view(batch, heads, *d_first.shape[1:]).to(d_state.dtype),
        None,
        None,
        None,
    )


def _full_precision(device: torch.device) -> AbstractContextManager:
    """Autocast must not touch float32 products; the meta device has none."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    scale: float,
    state: Tensor,
    segment_ids: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """Checked and defaulted arguments of `gated_delta_rule`."""
    time = v.shape[1]
    o, state = _apply(q, k, v, beta, log_decay, state, segment_ids, scale, chunk_size)
    return (o if o.shape[1] == time else o[:, :time].contiguous()), state


def chunked_summary(
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    segment_ids: Tensor | None,
    chunk_size: int,
) -> MatrixSummary:
    """Checked arguments of `gated_delta_rule_summary`.

    The recurrence acts on each column of the state alone, so K columns that start as the identity
    and are never written to end as the transition.
    """
    batch, _, heads, width = v.shape
    size, kind = k.shape[3], wide(v.dtype)
    columns = torch.eye(size, size + width, dtype=kind, device=v.device)
    columns = columns.expand(batch, heads, size, size + width)
    values = torch.nn.functional.pad(v, (size, 0))
    _, last = _apply(None, k, values, beta, log_decay, columns, segment_ids, 1.0, chunk_size)
    return MatrixSummary(last[..., :size], last[..., size:])


def _apply(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    state: Tensor,
    segment_ids: Tensor | None,
    scale: float,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """Pads time to whole chunks with tokens that neither decay nor write."""
    batch, time, heads, _ = v.shape
    chunk = min(chunk_size, 1 << (time - 1).bit_length())
    missing = -time % chunk
    if missing:
        v, beta = _pad(v, missing), _pad(beta, missing)
        k = _pad(k, missing)
        q = None if q is None else _pad(q, missing)
        log_decay = None if log_decay is None else _pad(log_decay, missing)
        if segment_ids is not None:
            tail = segment_ids[:, -1:].expand(batch, missing)
            segment_ids = torch.cat([segment_ids, tail], dim=1)
    shape = (*k.shape[:3], heads // k.shape[2], k.shape[3])
    k = k.unsqueeze(3).expand(shape)
    q = None if q is None else q.unsqueeze(3).expand(shape)
    with _full_precision(v.device):
        return ChunkedDelta.apply(q, k, v, beta, log_decay, state, segment_ids, scale, chunk)


def _pad(x: Tensor, amount: int) -> Tensor:
    return torch.nn.functional.pad(x, (0, 0) * (x.dim() - 2) + (0, amount))
