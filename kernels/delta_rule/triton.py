"""Gated delta rule on a GPU: writes of a chunk first, then states from chunk to chunk, then outputs
of all chunks at once; see `chunked.py` for what is computed.

Kept for the backward pass are the inputs and A, C numbers a token and head. W, U, the states and V'
are made again by the kernels of the forward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rondo.kernels.delta_rule.triton_ahead_of_time import ahead_of_time as ahead_of_time
from rondo.kernels.delta_rule.triton_backward import backward
from rondo.kernels.delta_rule.triton_calls import (
    chunk_length,
    invert,
    make_problem,
    mix,
    score,
    step,
    transform,
    walk,
)
from rondo.kernels.summary import MatrixSummary
from rondo.kernels.triton_support import opaque


def gated_delta_rule(
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
    """Checked and defaulted arguments of the package's `gated_delta_rule`."""
    tensors = (q, k, v, beta, log_decay, state)
    learns = any(x is not None and x.requires_grad for x in tensors)
    if v.shape[1] == 1 and not (learns and torch.is_grad_enabled()):
        return step(
            make_problem(q, k, v, beta, log_decay, None, scale, chunk_size), state.contiguous()
        )
    return TritonDelta.apply(*tensors, segment_ids, scale, chunk_size)


def summary(
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    segment_ids: Tensor | None,
    chunk_size: int,
) -> MatrixSummary:
    """Checked arguments of `gated_delta_rule_summary`; all in float32.

    Each column of the state is by itself, so K columns that start as the identity and are never
    written to end as the transition.
    """
    batch, _, heads, width = v.shape
    size = k.shape[3]
    columns = torch.eye(size, size + width, device=v.device)
    columns = columns.expand(batch, heads, size, size + width)
    values = torch.nn.functional.pad(v.float(), (size, 0))
    _, last = TritonDelta.apply(
        None, k.float(), values, beta, log_decay, columns, segment_ids, 1.0, chunk_size
    )
    return MatrixSummary(last[..., :size], last[..., size:])


class TritonDelta(torch.autograd.Function):
    """`(o, state)`; `o` is empty when `q` is None."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        o, last, inverse = _forward(*arguments)
        ctx.save_for_backward(*arguments[:7], inverse)
        ctx.options = arguments[7:]
        return o, last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors  # once: activation checkpointing recomputes at each access
        results = _backward(*tensors, *grads, *ctx.options)
        inputs = zip(tensors[:6], results, strict=True)
        return *(None if x is None else d.to(x.dtype) for x, d in inputs), None, None, None


def _fake_forward(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    state: Tensor,
    segment_ids: Tensor | None,
    scale: float,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    chunk = chunk_length(v, chunk_size)
    inverse = v.new_empty(*v.shape[:3], chunk)
    o = v.new_empty(v.shape if q is not None else 0)
    return o, state.new_empty(state.shape, dtype=torch.float32), inverse


@opaque("triton_delta", _fake_forward)
def _forward(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    state: Tensor,
    segment_ids: Tensor | None,
    scale: float,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs, the last state, and A for the backward pass."""
    p = make_problem(q, k, v, beta, log_decay, segment_ids, scale, chunk_size)
    inverse = invert(p)
    w, u = transform(p, inverse)
    states, written, last = walk(p, w, u, state.contiguous(), None, reverse=False)
    o = v.new_empty(0) if q is None else mix(p, written, states, score(p))
    return o, last, inverse


def _fake_backward(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    state: Tensor,
    segment_ids: Tensor | None,
    inverse: Tensor,
    d_o: Tensor,
    d_last: Tensor,
    scale: float,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (
        v.new_empty(0 if q is None else q.shape),
        v.new_empty(k.shape),
        v.new_empty(v.shape),
        v.new_empty(beta.shape, dtype=torch.float32),
        v.new_empty(0 if log_decay is None else log_decay.shape, dtype=torch.float32),
        v.new_empty(state.shape, dtype=torch.float32),
    )


@opaque("triton_delta_backward", _fake_backward)
def _backward(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    state: Tensor,
    segment_ids: Tensor | None,
    inverse: Tensor,
    d_o: Tensor,
    d_last: Tensor,
    scale: float,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the first six; empty where there is no input."""
    p = make_problem(q, k, v, beta, log_decay, segment_ids, scale, chunk_size)
    d_outputs = None if q is None else d_o.contiguous()
    results = backward(p, inverse, state.contiguous(), d_outputs, d_last.contiguous())
    d_q, d_k, d_v, d_beta, d_gate, d_first = results
    empty = d_beta.new_empty(0)
    return (
        v.new_empty(0) if d_q is None else d_q,
        d_k,
        d_v,
        d_beta,
        empty if d_gate is None else d_gate,
        d_first,
    )
