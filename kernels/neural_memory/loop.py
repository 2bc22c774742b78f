"""The chunks of a neural memory one after another, with a backward pass written by hand.

Only what changes the memory runs chunk by chunk; tokens read for a group of chunks at once. Of n
chunks the memory is kept before every √n-th. What lies between is made again in the backward pass
from what tokens wrote, which is kept: a few numbers a token and channel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rondo.kernels.neural_memory.backward import Backward
from rondo.kernels.neural_memory.chunk import (
    Learned,
    Reads,
    learn,
    limited_errors,
    read,
    update_norms,
    weighted,
)
from rondo.kernels.neural_memory.layers import Matrices
from rondo.kernels.neural_memory.plan import Kept, Plan, Sequences, begin


class Loop(torch.autograd.Function):
    """All chunks. Takes a plan, `Sequences`, the weights `(N, in, out)` of a new document, the
    weights where the open chunk began and the state `(N, 2 in, out)`, each a tensor a layer; gives
    outputs `(n, N, C, D)`, how often a limit acted `(N,)`, and the last two after the chunks."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, *tensors: Tensor) -> tuple[Tensor, ...]:
        sequences = Sequences(*tensors[:8])
        start, anchor, states = plan.by_layer(tensors[8:])
        groups = plan.groups()
        slots = [s.new_empty(groups[0].stop + 1, *s.shape) for s in states]
        outputs, kept, inner, before = [], [], [], []
        for part in groups:
            before += [*anchor, *states]
            for slot, state in zip(slots, states, strict=True):
                slot[0] = state
            anchor, learned, in_part = _forward(plan, part, sequences, start, anchor, slots)
            count = part.stop - part.start
            inputs = Reads(
                sequences.q[part],
                sequences.spread[part],
                sequences.reading[part],
                sequences.rate[part],
                learned.inputs,
                learned.errors,
                [slot[:count] for slot in slots],
            )
            outputs.append(read(inputs))
            kept.append(in_part)
            inner.append((*learned.products, *learned.returned))
            states = [slot[count].clone() for slot in slots]
        joined = Kept(*(torch.cat(each) for each in zip(*kept, strict=True)))
        inner = [torch.cat(each) for each in zip(*inner, strict=True)]
        ctx.plan, ctx.inner = plan, len(inner) // 2
        ctx.save_for_backward(*sequences, *joined, *start, *before, *inner)
        limited = _count(joined, sequences.rate)
        ctx.mark_non_differentiable(limited)
        return torch.cat(outputs), limited, *anchor, *states

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, to_o: Tensor, _: Tensor, *to_memory: Tensor) -> tuple[Any, ...]:
        plan, saved = ctx.plan, ctx.saved_tensors
        end = len(saved) - 2 * ctx.inner
        start, *before = plan.by_layer(saved[11:end])
        inner = saved[end : end + ctx.inner], saved[end + ctx.inner :]
        back = Backward(plan, Sequences(*saved[:8]), Kept(*saved[8:11]), start, to_memory)
        found = []
        for number, part in reversed(list(enumerate(plan.groups()))):
            here = [[x[part] for x in each] for each in inner]
            anchor, states = before[2 * number : 2 * number + 2]
            found.append(back.group(part, here, anchor, states, to_o))
        to_sequences = [torch.cat(each[::-1]) for each in zip(*found, strict=True)]
        return None, *to_sequences, *back.to_start, *back.to_anchor, *back.to_states


def _scales(plan: Plan, i: int, states: list[Tensor]) -> Tensor:
    limit = plan.limits.weight
    norms = [torch.linalg.vector_norm(s.view(len(s), 2, -1), dim=-1) for s in states]
    scales = limit / torch.stack(norms).clamp_min(limit)
    return torch.where(plan.full[i][:, None], scales, 1.0) if plan.mixed[i] else scales


def _forward(
    plan: Plan,
    part: slice,
    sequences: Sequences,
    start: Matrices,
    anchor: Matrices,
    slots: list[Tensor],
) -> tuple[Matrices, Learned, Kept]:
    """Fills `slots` `(g + 1, N, 2 in, out)` with the states as chunks find them, and last the one
    after them. Returns the weights where the open chunk began, and what the chunks have learned,
    with limited errors."""
    found, kept = [], []
    for j, i in enumerate(range(part.start, part.stop)):
        states = [slot[j] for slot in slots]
        scales = _scales(plan, i, states)
        anchor = begin(plan, i, start, anchor, states, scales)
        learned = learn(anchor, sequences.k[i], sequences.target[i])
        norms = update_norms(learned.inputs, learned.errors).clamp_min(plan.limits.update)
        factor = (plan.limits.update / norms).to(sequences.rate.dtype)
        by = sequences.rate[i][..., None] * sequences.at_end[i]
        errors = limited_errors(learned.errors, factor)
        for slot, a, error in zip(slots, learned.inputs, errors, strict=True):
            written = weighted(a, by)
            plan.passes.advance(slot[j], sequences.carried[i], written, error, slot[j + 1])
        kept.append(Kept(learned.errors[-1], factor, scales))
        found.append(learned._replace(errors=errors))
    stacked = (
        [torch.stack(layer) for layer in zip(*each, strict=True)]
        for each in zip(*found, strict=True)
    )
    anchor = [a.clone() for a in anchor]
    return anchor, Learned(*stacked), Kept(*map(torch.stack, zip(*kept, strict=True)))


def _count(kept: Kept, rate: Tensor) -> Tensor:
    """How often a limit acted `(N,)`."""
    updates = (kept.factors < 1) & (rate > 0)[:, None]
    return updates.sum((0, 1, 3)) + (kept.scales < 1).sum((0, 1, 3))
