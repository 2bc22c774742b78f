"""The gated delta rule by Triton kernels where the state before the row comes later.

A, W and U are made once. Their summary is one walk of V + K columns that writes down its end alone;
outputs take another walk, of V columns, from the state that comes. Correcting what the first walk
met would take more products, and K more columns of states between chunks: see the README.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rondo.kernels.delta_rule.triton_backward import gradients
from rondo.kernels.delta_rule.triton_calls import (
    chunk_length,
    invert,
    make_problem,
    mix,
    score,
    summarize,
    transform,
    walk,
    walk_back,
)
from rondo.kernels.stretch import Steps, stretch
from rondo.kernels.summary import MatrixSummary, Stretch
from rondo.kernels.triton_support import opaque


def begin_stretch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    scale: float,
    segment_ids: Tensor | None,
    chunk_size: int,
) -> Stretch:
    """Checked and defaulted arguments of `gated_delta_rule_stretch`."""
    inputs = (q, k, v, beta, log_decay, segment_ids)
    return stretch(_STEPS, MatrixSummary, inputs, (scale, chunk_size))


def _fake_begin(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    segment_ids: Tensor | None,
    scale: float,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    (batch, time, heads, width), key_dim = v.shape, k.shape[3]
    transition, state = (
        v.new_empty(batch, heads, key_dim, columns, dtype=torch.float32)
        for columns in (key_dim, width)
    )
    inverse, w = (
        v.new_empty(batch, time, heads, columns)
        for columns in (chunk_length(v, chunk_size), key_dim)
    )
    return transition, state, inverse, w, v.new_empty(v.shape)


@opaque("triton_delta_begin", _fake_begin)
def _begin(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    segment_ids: Tensor | None,
    scale: float,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The summary, A, W and U."""
    p = make_problem(q, k, v, beta, log_decay, segment_ids, scale, chunk_size)
    inverse = invert(p)
    w, u = transform(p, inverse)
    return *summarize(p, w, u), inverse, w, u


def _fake_finish(
    first: Tensor,
    inverse: Tensor,
    w: Tensor,
    u: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    segment_ids: Tensor | None,
    scale: float,
    chunk_size: int,
) -> Tensor:
    return v.new_empty(v.shape)


@opaque("triton_delta_finish", _fake_finish)
def _finish(
    first: Tensor,
    inverse: Tensor,
    w: Tensor,
    u: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    segment_ids: Tensor | None,
    scale: float,
    chunk_size: int,
) -> Tensor:
    p = make_problem(q, k, v, beta, log_decay, segment_ids, scale, chunk_size)
    states, written, _ = walk(p, w, u, first.contiguous(), None, reverse=False)
    return mix(p, written, states, score(p))


def _fake_reverse(
    first: Tensor,
    d_o: Tensor,
    inverse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    segment_ids: Tensor | None,
    scale: float,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    w = v.new_empty(*v.shape[:3], k.shape[3])
    return first.new_empty(first.shape), w, v.new_empty(v.shape), v.new_empty(v.shape)


@opaque("triton_delta_reverse", _fake_reverse)
def _reverse(
    first: Tensor,
    d_o: Tensor,
    inverse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    segment_ids: Tensor | None,
    scale: float,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradient of the state before the row by the outputs alone, W, U, and the gradient of V' by
    the outputs of its own chunk."""
    p = make_problem(q, k, v, beta, log_decay, segment_ids, scale, chunk_size)
    d_o = d_o.contiguous()
    w, u = transform(p, inverse)
    own = mix(p, d_o, None, score(p), reverse=True)
    return walk_back(p, w, own, d_o), w, u, own


def _reversed(first: Tensor, d_o: Tensor, inverse: Tensor, *others: Any) -> tuple[Tensor, ...]:
    d_first, *made = _reverse(first, d_o, inverse, *others)
    return d_first, first, d_o, inverse, *made


def _shapes(state: Tensor, inverse: Tensor, w: Tensor, u: Tensor, *inputs: Any) -> tuple:
    return tuple((x.shape, x.dtype) for x in (state, u, inverse, w, u, u))


def _fake_gradients(
    d_state: Tensor | None,
    first: Tensor | None,
    d_o: Tensor | None,
    inverse: Tensor | None,
    w: Tensor | None,
    u: Tensor | None,
    own: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    segment_ids: Tensor | None,
    scale: float,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    d_q, d_k, d_v, d_beta, d_gate = (
        v.new_empty(0) if x is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
        for x in (q, k, v, beta, log_decay)
    )
    return d_q, d_k, d_v, d_beta, d_gate


@opaque("triton_delta_stretch_gradients", _fake_gradients)
def _all_gradients(
    d_state: Tensor | None,
    first: Tensor | None,
    d_o: Tensor | None,
    inverse: Tensor | None,
    w: Tensor | None,
    u: Tensor | None,
    own: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    segment_ids: Tensor | None,
    scale: float,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Of q, k, v, beta and log_decay; the last empty without one."""
    p = make_problem(q, k, v, beta, log_decay, segment_ids, scale, chunk_size)
    nothing = torch.zeros_like(p.state())
    d_last = nothing if d_state is None else d_state.contiguous()
    if first is None or d_o is None or inverse is None or w is None or u is None:
        # The outputs were not asked for: what is left is a row that starts from zero.
        p, inverse, first, d_o = p._replace(q=None), invert(p), nothing, None
        w, u = transform(p, inverse)
        own = None
    else:
        first, d_o = first.contiguous(), d_o.contiguous()
    d_q, *others, d_gate, _ = gradients(p, inverse, first, d_o, d_last, w, u, own)
    found = (torch.zeros_like(p.k) if d_q is None else d_q, *others)
    d_q, d_k, d_v, d_beta = (d.to(x.dtype) for d, x in zip(found, (q, k, v, beta), strict=True))
    if d_gate is None or log_decay is None:
        return d_q, d_k, d_v, d_beta, v.new_empty(0)
    return d_q, d_k, d_v, d_beta, d_gate.to(log_decay.dtype)


def _gradients(*arguments: Any) -> tuple[Tensor | None, ...]:
    *found, d_gate = _all_gradients(*arguments)
    return *found, None if arguments[11] is None else d_gate, None


_STEPS = Steps(_begin, _finish, _reversed, _gradients, _shapes, kept=3, saved=1)
