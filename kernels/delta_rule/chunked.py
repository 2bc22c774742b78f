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

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rondo.kernels.backend import full_precision
from rondo.kernels.delta_rule.backward import Saved, backward
from rondo.kernels.delta_rule.gates import wide
from rondo.kernels.delta_rule.layout import from_chunks, to_chunks
from rondo.kernels.delta_rule.operands import make_gates, make_operands, make_pairs
from rondo.kernels.delta_rule.triangular import invert_unit_lower
from rondo.kernels.summary import MatrixSummary


class ChunkedDelta(torch.autograd.Function):
    """`(o, state)`; `o` is empty when `q` is None, and the states then never leave float32.

    q, k: `(B, T, G, H / G, K)`; T is a multiple of `chunk`; the rest as for `gated_delta_rule`.
    """

    @staticmethod
    def forward(
        ctx: Any,
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
        dtype = v.dtype
        pairs = make_pairs(log_decay, segment_ids, chunk, v)
        gates = make_gates(log_decay, segment_ids, pairs, chunk, v)
        x = make_operands(q, k, beta, gates, scale, chunk, dtype)
        products = gates.products(x.readers, x.keys)
        inverse = invert_unit_lower(products[-1].to(wide(dtype))).to(dtype)
        chain = dtype if q is not None else wide(dtype)
        w = torch.bmm(inverse, x.from_start[-1]).to(chain)
        written = torch.bmm(inverse, to_chunks(v, chunk) * x.beta).to(chain)
        states, last = _advance(w, written, x.to_end.to(chain), x.through, state.flatten(0, 1))
        o = v.new_empty(0)
        if q is not None:
            o = torch.bmm(x.from_start[0], states).baddbmm_(products[0], written)
            o = from_chunks(o, v.shape[0], v.shape[2:3])
        ctx.save_for_backward(
            q, k, v, beta, log_decay, segment_ids, pairs, inverse, written, states, *products
        )
        ctx.scale, ctx.chunk = scale, chunk
        return o, last.view_as(state)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors  # once: activation checkpointing recomputes at each access
        saved = Saved(*tensors[:10], products=list(tensors[10:]))
        with full_precision(saved.v.device):
            return *backward(saved, ctx.scale, ctx.chunk, *grads), None, None, None


def _advance(
    w: Tensor, u: Tensor, to_end: Tensor, through: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The recurrence over chunks, from `state` `(B * H, K, V)`. Turns `u` into V' in place.

    Returns the states before every chunk `(Y, K, V)` in the dtype of `w`, and the last state.
    """
    rows, state = len(state), state.clone()
    states = w.new_empty(len(w), *state.shape[1:])
    decays = None if through is None else through.split(rows)
    steps = (x.split(rows) for x in (states, w, u, to_end.mT))
    for n, (before, erase, written, write) in enumerate(zip(*steps, strict=True)):
        written.baddbmm_(erase, before.copy_(state))
        if decays is not None:
            state.mul_(decays[n])
        state.add_(torch.bmm(write, written))
    return states, state


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
    with full_precision(v.device):
        return ChunkedDelta.apply(q, k, v, beta, log_decay, state, segment_ids, scale, chunk)


def _pad(x: Tensor, amount: int) -> Tensor:
    return torch.nn.functional.pad(x, (0, 0) * (x.dim() - 2) + (0, amount))
