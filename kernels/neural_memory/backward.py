"""The backward pass of `loop`, a group of chunks at a time."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rondo.kernels.neural_memory.chunk import (
    Learned,
    Reads,
    bend,
    learn_backward,
    learned_again,
    limit_backward,
    limited_errors,
    read_backward,
    weighted,
)
from rondo.kernels.neural_memory.layers import Matrices
from rondo.kernels.neural_memory.plan import Kept, Plan, Sequences, begin
from rondo.kernels.tiles import has_numbers


class _Group(NamedTuple):
    """Some chunks as the forward pass had them; lists have an entry a layer."""

    learned: Learned
    errors: list[Tensor]
    """As limited."""
    by: Tensor
    """Parts of a token in the weights and in the momentum at the end `(g, N, C, 2)`."""
    written: list[Tensor]
    """`(g, N, C, 2 in)`."""
    bends: list[Tensor]
    """As `learn_backward` wants them."""
    anchors: list[Matrices]
    """Of every chunk the weights it learns at."""
    states: list[Tensor]
    """As every chunk finds them `(g, N, 2 in, out)`."""


class Backward:
    """Goes back through groups of chunks, last first. `to_anchor`, `to_states`: gradients of the
    memory after the chunks still to come; `to_start`: of a new document's, added up."""

    def __init__(
        self,
        plan: Plan,
        sequences: Sequences,
        kept: Kept,
        start: Matrices,
        to_memory: tuple[Tensor, ...],
    ) -> None:
        self.plan, self.sequences, self.kept, self.start = plan, sequences, kept, start
        self.to_anchor, to_states = plan.by_layer(to_memory)
        self.to_states = [x.contiguous() for x in to_states]
        self.to_start, self.nothing = ([torch.zeros_like(w) for w in start] for _ in range(2))

    def group(
        self,
        part: slice,
        inner: list[list[Tensor]],
        anchor: Matrices,
        states: list[Tensor],
        to_o: Tensor,
    ) -> Sequences:
        """Gradients of what chunks `part` took in.

        Args:
            inner: `products` and `returned` of what they learned.
            anchor: the weights where the open chunk before them began.
            states: the states before them.
            to_o: gradient of the outputs of all chunks.
        """
        limited = [
            not has_numbers() or bool((x[part] < 1).any())
            for x in (self.kept.factors, self.kept.scales)
        ]
        group = self._again(part, inner, anchor, states, limited)
        inputs = Reads(
            self.sequences.q[part],
            self.sequences.spread[part],
            self.sequences.reading[part],
            self.sequences.rate[part],
            group.learned.inputs,
            group.errors,
            group.states,
        )
        to = read_backward(inputs, to_o[part])
        to_by, to_carried = [], []
        for j in reversed(range(part.stop - part.start)):
            by, carried = self._chunk(part.start + j, j, group, to, limited)
            to_by.append(by)
            to_carried.append(carried)
        to_at_end = torch.stack(to_by[::-1])
        to_rate = to.rate + (to_at_end * self.sequences.at_end[part]).sum(-1)
        return Sequences(
            q=to.q,
            k=to.inputs[0],
            target=to.errors[-1],
            rate=to_rate,
            spread=to.spread,
            reading=to.reading,
            at_end=to_at_end * self.sequences.rate[part][..., None],
            carried=torch.stack(to_carried[::-1]),
        )

    def _again(
        self,
        part: slice,
        inner: list[list[Tensor]],
        anchor: Matrices,
        states: list[Tensor],
        limited: list[bool],
    ) -> _Group:
        learned = learned_again(self.sequences.k[part], inner, self.kept.error[part])
        errors = learned.errors
        if limited[0]:
            errors = limited_errors(errors, self.kept.factors[part].transpose(0, 1))
        by = self.sequences.rate[part][..., None] * self.sequences.at_end[part]
        written = [weighted(a, by) for a in learned.inputs]
        count, anchors, advance = part.stop - part.start, [], self.plan.passes.advance
        slots = [s.new_empty(count, *s.shape) for s in states]
        for slot, state in zip(slots, states, strict=True):
            slot[0] = state
        for j, i in enumerate(range(part.start, part.stop)):
            now = [slot[j] for slot in slots]
            scales = self.kept.scales[i] if limited[1] else None
            anchor = begin(self.plan, i, self.start, anchor, now, scales)
            anchors.append(anchor)
            if j + 1 < count:
                for slot, a, error in zip(slots, written, errors, strict=True):
                    advance(slot[j], self.sequences.carried[i], a[j], error[j], slot[j + 1])
        bends = [bend(z) * h for z, h in zip(learned.products, learned.returned, strict=True)]
        return _Group(learned, errors, by, written, bends, anchors, slots)

    def _chunk(
        self, i: int, j: int, group: _Group, to: Reads, limited: list[bool]
    ) -> tuple[Tensor, Tensor]:
        """Chunk i, the j-th of the group: completes the gradients of its inputs and errors in
        `to`; returns those of `by` and `carried`."""
        learned = Learned(*([x[j] for x in each] for each in group.learned))
        to_inputs, to_errors, to_states = (
            [x[j] for x in each] for each in (to.inputs, to.errors, to.states)
        )
        states, to_carried = [x[j] for x in group.states], []
        to_by = torch.zeros_like(group.by[j])
        for layer, after in enumerate(self.to_states):
            a, error = learned.inputs[layer], group.errors[layer][j]
            to_errors[layer].baddbmm_(group.written[layer][j], after, alpha=-1)
            back = torch.bmm(error, after.mT).unflatten(-1, (2, -1))
            for half in range(2):
                share = group.by[j, ..., half, None]
                to_inputs[layer].addcmul_(back[:, :, half], share, value=-1)
            to_by -= (back * a[:, :, None]).sum(-1)
            if limited[0]:
                factor = self.kept.factors[i, layer]
                by = torch.where(factor < 1, (to_errors[layer] * error).sum(-1), 0.0)
                to_errors[layer] *= factor[..., None]
                limit_backward(by, a, to_inputs[layer])
                limit_backward(by, learned.errors[layer], to_errors[layer])
            through = states[layer], self.sequences.carried[i], after, to_states[layer]
            to_carried.append(self.plan.passes.advance_backward(*through))
        to_weights = self._anchors_to(i, to_states)
        bends = [x[j] for x in group.bends]
        learn_backward(group.anchors[j], learned, bends, to_inputs, to_errors, to_weights)
        self._begin_backward(i, states, to_states, to_weights, limited[1])
        return to_by, torch.stack(to_carried).sum(0)

    def _anchors_to(self, i: int, to_states: list[Tensor]) -> Matrices:
        """Where gradients of the weights that chunk i learns at are added up."""
        if self.plan.mixed[i]:
            return [x.clone() for x in self.to_anchor]
        weights = [x[:, : x.shape[1] // 2] for x in to_states]
        if self.to_anchor is not self.nothing:
            for w, later in zip(weights, self.to_anchor, strict=True):
                w += later
        return weights

    def _begin_backward(
        self,
        i: int,
        states: list[Tensor],
        to_states: list[Tensor],
        to_weights: Matrices,
        limited: bool,
    ) -> None:
        if not self.plan.mixed[i]:
            self.to_anchor = self.nothing
        else:
            begins = self.plan.begins[i][:, None, None]
            renewed = begins | self.plan.full[i][:, None, None]
            self.to_anchor = [torch.where(renewed, 0.0, w) for w in to_weights]
            for layer, (to_state, w) in enumerate(zip(to_states, to_weights, strict=True)):
                to_now = to_state[:, : w.shape[1]]
                to_now += torch.where(renewed, w, 0.0)
                self.to_start[layer] += torch.where(begins, to_now, 0.0)
                to_state.masked_fill_(begins, 0.0)
        if limited:
            for layer, (state, to_state) in enumerate(zip(states, to_states, strict=True)):
                now, to_now = (x.view(len(x), 2, -1) for x in (state, to_state))
                scale = self.kept.scales[i, layer][..., None]
                along = (now * to_now).sum(-1, keepdim=True) / self.plan.limits.weight**2
                to_now.addcmul_(now, torch.where(scale < 1, -along, 0.0)).mul_(scale)
        self._hand_on(i, to_states)
        self.to_states = to_states

    def _hand_on(self, i: int, to_states: list[Tensor]) -> None:
        """Scales down, in place, what chunk i hands to the one before: `layers.HandOn`."""
        limit = self.plan.limits.gradient
        for to_state in to_states:
            halves = to_state.view(len(to_state), 2, -1)
            largest = halves.abs().amax(-1)  # a norm of order inf is far slower on a CPU
            scales = limit / largest.clamp_min(limit)
            if self.plan.mixed[i]:
                scales = torch.where(self.plan.full[i][:, None], scales, 1.0)
            self.plan.passes.scale(to_state, scales)
