"""The forward and backward pass of gated linear attention by Triton kernels.

To a compiler each is one operator (`opaque`), so results are made whether or not they are wanted,
and what an argument that is None would get is empty.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rondo.kernels.linear_attention.triton_calls import (
    Problem,
    Sizes,
    States,
    head_gradients,
    mix,
    score_gradients,
    step,
    walk,
)
from rondo.kernels.linear_attention.triton_key_calls import key_gradients, key_scores
from rondo.kernels.triton_support import opaque

LARGEST_CHUNK = 64
LARGEST_CHUNK_FLOAT32 = 32
"""Of float32 numbers, twice as wide and multiplied without tensor cores."""


def contiguous(x: Tensor | None) -> Tensor | None:
    """`x`, its numbers in order in memory, if it is there."""
    return None if x is None else x.contiguous()


def make_problem(
    k: Tensor, v: Tensor, log_decay: Tensor | None, segment_ids: Tensor | None, chunk_size: int
) -> Problem:
    """Sizes of a call, its chunks among them, and its gates and documents."""
    batch, time, heads, value_dim = v.shape
    wide = v.dtype == torch.float32
    wanted = min(chunk_size, LARGEST_CHUNK_FLOAT32 if wide else LARGEST_CHUNK)
    chunk = max(16, 1 << (wanted.bit_length() - 1))
    sizes = Sizes(batch, time, k.shape[2], heads, k.shape[3], value_dim, chunk)
    return Problem(sizes, contiguous(log_decay), contiguous(segment_ids))


def _fake_forward(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    segment_ids: Tensor | None,
    scale: float,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    batch, _, heads, value_dim = v.shape
    last = v.new_empty(batch, heads, k.shape[3], value_dim, dtype=torch.float32)
    return v.new_empty(0 if q is None else v.shape), last


@opaque("triton_linear_attention", _fake_forward)
def forward_pass(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    segment_ids: Tensor | None,
    scale: float,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """Output `(B, T, H, V)` and state `(B, H, K, V)`, float32; without q, no output."""
    k, v = k.contiguous(), v.contiguous()
    problem = make_problem(k, v, log_decay, segment_ids, chunk_size)
    initial_state = contiguous(initial_state)
    states, last = walk(problem, k, v, initial_state, v, store=q is not None)
    if q is None:
        return v.new_empty(0), last
    q = q.contiguous()
    scores = key_scores(problem, q, k, scale) if problem.by_key else None
    return mix(problem, q, k, v, States(states), scores, scale), last


def _fake_backward(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    segment_ids: Tensor | None,
    do: Tensor | None,
    dlast: Tensor | None,
    scale: float,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv, dg, dinitial = (
        v.new_empty(0) if x is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
        for x in (q, k, v, log_decay, initial_state)
    )
    return dq, dk, dv, dg, dinitial


@opaque("triton_linear_attention_backward", _fake_backward)
def backward_pass(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    segment_ids: Tensor | None,
    do: Tensor | None,
    dlast: Tensor | None,
    scale: float,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, log_decay and initial_state; without do, what comes from the state."""
    k, v, nothing = k.contiguous(), v.contiguous(), v.new_empty(0)
    problem = make_problem(k, v, log_decay, segment_ids, chunk_size)
    queries = None if q is None or do is None else q.contiguous()
    do = None if queries is None else contiguous(do)
    states, _ = walk(problem, k, v, contiguous(initial_state), v)
    dstates, dfirst = walk(problem, queries, do, contiguous(dlast), v, scale=scale, reverse=True)
    dq, dk, dv, dg = gradients(problem, queries, k, v, do, (states, States(dstates)), scale)
    return (
        nothing if q is None else dq,
        dk,
        dv,
        nothing if dg is None or log_decay is None else dg.to(log_decay.dtype),
        nothing if initial_state is None else dfirst.to(initial_state.dtype),
    )


def gradients(
    problem: Problem,
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    do: Tensor | None,
    states: tuple[Tensor, States],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Of q, k, v and log_decay, from the states before chunks and the gradients of those after
    them; without q and do, what comes from the latter."""
    if problem.by_key and (q is None or do is None):
        q, do = torch.zeros_like(k), torch.zeros_like(v)
    dscores = None if do is None else score_gradients(problem, v, do, scale)
    scores = None
    if problem.by_key and q is not None and do is not None and dscores is not None:
        scores = key_scores(problem, q, k, scale)
        dq, dk, dg = key_gradients(problem, q, k, v, do, dscores, states, scale)
    else:
        dq, dk, dg = head_gradients(problem, q, k, v, do, dscores, states, scale)
    return dq, dk, mix(problem, k, q, do, states[1], scores, scale, reverse=True), dg


def one_position(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output and state after a single position, without gradients."""
    problem = make_problem(k, v, log_decay, None, 16)
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    return step(problem, q, k, v, contiguous(initial_state), scale)
