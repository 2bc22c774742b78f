"""Gated linear attention by Triton kernels where the state before the row comes later.

One walk from a zero state serves the summary and the outputs, which add what the walk leaves of the
state that comes; so does one walk back for the gradient of that state and those of the inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rondo.kernels.linear_attention.triton_calls import Problem, States, mix, walk
from rondo.kernels.linear_attention.triton_key_calls import key_scores
from rondo.kernels.linear_attention.triton_passes import contiguous, gradients, make_problem
from rondo.kernels.stretch import Steps, stretch
from rondo.kernels.summary import DiagonalSummary, Stretch
from rondo.kernels.triton_support import opaque


def begin_stretch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    scale: float,
    segment_ids: Tensor | None,
    chunk_size: int,
) -> Stretch:
    """Checked arguments of `gated_linear_attention_stretch`."""
    inputs = (q, k, v, log_decay, segment_ids)
    return stretch(_STEPS, DiagonalSummary, inputs, (scale, chunk_size))


def _like(
    k: Tensor, v: Tensor, log_decay: Tensor | None, chunk_size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Transition, state, states met and reach, without numbers."""
    problem = make_problem(k, v, log_decay, None, chunk_size)
    reach = problem.reach(v)
    transition = torch.empty_like(reach[:, 0]).unsqueeze(-1)
    return transition, problem.states(v), problem.states(v, problem.sizes.chunks), reach


def _fake_begin(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    segment_ids: Tensor | None,
    scale: float,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _like(k, v, log_decay, chunk_size)


@opaque("triton_linear_attention_begin", _fake_begin)
def _begin(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    segment_ids: Tensor | None,
    scale: float,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    problem, _, k, v = _given(q, k, v, log_decay, segment_ids, chunk_size)
    reach = problem.reach(v)
    met, state = walk(problem, k, v, None, v, reach=reach)
    return reach[:, -1].unsqueeze(-1).clone(), state, met, reach


def _fake_finish(
    first: Tensor,
    met: Tensor,
    reach: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    segment_ids: Tensor | None,
    scale: float,
    chunk_size: int,
) -> Tensor:
    return v.new_empty(v.shape)


@opaque("triton_linear_attention_finish", _fake_finish)
def _finish(
    first: Tensor,
    met: Tensor,
    reach: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    segment_ids: Tensor | None,
    scale: float,
    chunk_size: int,
) -> Tensor:
    problem, q, k, v = _given(q, k, v, log_decay, segment_ids, chunk_size)
    scores = key_scores(problem, q, k, scale) if problem.by_key else None
    return mix(problem, q, k, v, States(met, first.contiguous(), reach), scores, scale)


def _fake_reverse(
    first: Tensor,
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    segment_ids: Tensor | None,
    scale: float,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    _, dfirst, dmet, dreach = _like(k, v, log_decay, chunk_size)
    return dfirst, dmet, dreach


@opaque("triton_linear_attention_reverse", _fake_reverse)
def _reverse(
    first: Tensor,
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    segment_ids: Tensor | None,
    scale: float,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of the state before the row, those after chunks, both by the outputs alone, and what
    a walk back leaves of a gradient."""
    problem, q, _, v = _given(q, k, v, log_decay, segment_ids, chunk_size)
    reach = problem.reach(v)
    met, dfirst = walk(problem, q, do.contiguous(), None, v, scale=scale, reverse=True, reach=reach)
    return dfirst, met, reach


def _reversed(first: Tensor, do: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    return *_reverse(first, do, *others), do, first


def _shapes(state: Tensor, met: Tensor, reach: Tensor, *inputs: Tensor) -> tuple:
    return tuple((x.shape, x.dtype) for x in (met, reach, inputs[2], state))


def _fake_gradients(
    dstate: Tensor | None,
    dmet: Tensor | None,
    dreach: Tensor | None,
    do: Tensor | None,
    first: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    segment_ids: Tensor | None,
    scale: float,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv, dg = (
        v.new_empty(0) if x is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
        for x in (q, k, v, log_decay)
    )
    return dq, dk, dv, dg


@opaque("triton_linear_attention_stretch_gradients", _fake_gradients)
def _all_gradients(
    dstate: Tensor | None,
    dmet: Tensor | None,
    dreach: Tensor | None,
    do: Tensor | None,
    first: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    segment_ids: Tensor | None,
    scale: float,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of q, k, v and log_decay; the last empty without one."""
    problem, q, k, v = _given(q, k, v, log_decay, segment_ids, chunk_size)
    states, _ = walk(problem, k, v, contiguous(first), v)
    dstate = contiguous(dstate)
    if dmet is None:
        after = States(walk(problem, None, None, dstate, v, reverse=True)[0])
    else:
        after = States(dmet, dstate, None if dstate is None else dreach)
    queries, upstream = (None, None) if do is None else (q, do.contiguous())
    dq, dk, dv, dg = gradients(problem, queries, k, v, upstream, (states, after), scale)
    nothing = v.new_empty(0)
    return dq, dk, dv, nothing if dg is None or log_decay is None else dg.to(log_decay.dtype)


def _gradients(*arguments: Tensor | None) -> tuple[Tensor | None, ...]:
    dq, dk, dv, dg = _all_gradients(*arguments)
    return dq, dk, dv, None if arguments[8] is None else dg, None


def _given(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    segment_ids: Tensor | None,
    chunk_size: int,
) -> tuple[Problem, Tensor, Tensor, Tensor]:
    k, v = k.contiguous(), v.contiguous()
    return make_problem(k, v, log_decay, segment_ids, chunk_size), q.contiguous(), k, v


_STEPS = Steps(_begin, _finish, _reversed, _gradients, _shapes, kept=2, saved=0)
