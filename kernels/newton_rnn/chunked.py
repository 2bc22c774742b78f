"""Newton's method as one node of autograd, in chunks that suit the machine."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rondo.kernels.backend import log_once
from rondo.kernels.newton_rnn.cells import Cell
from rondo.kernels.newton_rnn.gradients import Gradients, Solution, gradients
from rondo.kernels.newton_rnn.neighbours import Neighbours
from rondo.kernels.newton_rnn.newton import TORCH, Health, Passes, Policy, solve
from rondo.kernels.newton_rnn.sweeps import Rows
from rondo.kernels.segments import document_starts
from rondo.kernels.tiles import has_numbers

WIDE = 32768
"""With this many channels in all rows one position is enough work for a step on a CPU."""
STEP = 2**17
"""Elements that a step should have on a CPU; a GPU wants sixteen times as many."""
LEAST = 32
"""Positions of a chunk, at least."""


def chunk_size(batch: int, time: int, width: int, device: torch.device) -> int:
    """Positions of a chunk: few, so that steps are wide; many, so that a chunk forgets how it
    began, and borders are few."""
    if not has_numbers():
        return 1
    cpu = device.type == "cpu"
    if cpu and batch * width >= WIDE:
        return time
    wide = time * batch * width // (STEP if cpu else 16 * STEP)
    return min(max(LEAST, math.isqrt(time) // 2, wide), time)


@torch.compiler.disable  # how often it iterates depends on the numbers
def newton_rnn(
    cell: Cell,
    gates: Tensor,
    weights: Tensor,
    bias: Tensor | None,
    first: Tensor,
    segment_ids: Tensor | None,
    policy: Policy,
    neighbours: Neighbours | None,
) -> tuple[Tensor, Tensor, Health]:
    """Gates `(B, T, G, W)`, weights `(R, W)`, bias `(G, W)` and first `(B, N, W)`, all but the
    gates of the dtype that is computed in. Returns outputs `(B, T, W)` of that dtype, the last
    state `(B, N, W)`, and how it went. With `neighbours` it is one stretch of rows, and `first`
    the state before the first stretch."""
    batch, time, _, width = gates.shape
    size = chunk_size(batch, time, width, gates.device)
    inputs = gates, weights, bias, first, segment_ids
    return run(Backend("chunked", TORCH, gradients), cell, size, inputs, policy, neighbours)


class Backend(NamedTuple):
    """What computes."""

    name: str
    passes: Passes
    gradients: Callable[[Solution, Tensor, Neighbours | None], Gradients]
    """As `gradients.gradients`."""


def run(
    backend: Backend,
    cell: Cell,
    size: int,
    inputs: tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor | None],
    policy: Policy,
    neighbours: Neighbours | None,
) -> tuple[Tensor, Tensor, Health]:
    """`newton_rnn` in chunks of `size`; inputs: gates, weights, bias, first, segment_ids."""
    gates, weights, bias, first, segment_ids = inputs
    batch, time, _, width = gates.shape
    starts = None if segment_ids is None else document_starts(segment_ids).unsqueeze(-1)
    if size == time > LEAST and neighbours is None:
        reason = f"{batch * width} channels in all rows are enough work for a step; health is 0"
        form = f"{backend.name} as a plain loop over time"
        log_once("newton_rnn", form, gates.device.type, reason)
    h, last, *health = _Newton.apply(
        backend, cell, size, policy, neighbours, gates, weights, bias, starts, first
    )
    return h, last, Health(*health)


class _Newton(torch.autograd.Function):
    """Keeps its inputs and the states of the solution."""

    @staticmethod
    def forward(
        ctx: Any,
        backend: Backend,
        cell: Cell,
        size: int,
        policy: Policy,
        neighbours: Neighbours | None,
        gates: Tensor,
        weights: Tensor,
        bias: Tensor | None,
        starts: Tensor | None,
        first: Tensor,
    ) -> tuple[Tensor, ...]:
        rows = Rows(cell, gates, weights, bias, starts, size)
        first = first.transpose(0, 1).unsqueeze(2)
        found = solve(rows, first, policy, neighbours, backend.passes)
        ctx.backend, ctx.cell, ctx.size, ctx.neighbours = backend, cell, size, neighbours
        ctx.save_for_backward(gates, weights, bias, starts, found.before, found.states)
        ctx.mark_non_differentiable(*found.health)
        ctx.set_materialize_grads(False)
        last = found.states[:, :, -1].transpose(0, 1).contiguous()
        return found.states[-1], last, *found.health

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "newton_rnn has first derivatives only: its gradient cannot be taken with "
                "create_graph=True; use backend='reference'"
            )
        gates, weights, bias, starts, before, states = ctx.saved_tensors
        rows = Rows(ctx.cell, gates, weights, bias, starts, ctx.size)
        at_output, at_last = grads[:2]
        if at_last is None:
            at_last = torch.zeros_like(before)
        else:
            at_last = at_last.transpose(0, 1).unsqueeze(2)
        solution = Solution(rows, states, before, at_output)
        found = ctx.backend.gradients(solution, at_last, ctx.neighbours)
        at_first = found.before.squeeze(2).transpose(0, 1)
        return (*[None] * 5, found.gates, found.weights, found.bias, None, at_first)
