"""Sequence parallel: each rank holds a contiguous stretch of every row, in rank order.

Operators that reach across positions are replaced by forms that reach across ranks. A linear
recurrence maps the state before a stretch affinely to the state after it (`kernels.summary`):
ranks exchange these maps in one all-gather whose size does not depend on the length, each folds
those of the ranks before it into its own initial state, and runs the ordinary operator from there
(LASP-2, arXiv 2502.07563, extended to matrix transitions). Gradients follow by the transposes of
these steps and are exact. Nothing here knows what a mixer is.

`segment_ids` are slices of ids that are consistent over the whole row. A document that begins
exactly at a rank's first position must not see the state before it: ranks compare the ids on both
sides of each border, which travel with the summaries.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rondo.kernels import attention, short_conv
from rondo.kernels.recurrences import SUMMARIES
from rondo.models.ffn.dispatch import whole_sequence
from rondo.parallel.attention import attention_over_ranks
from rondo.parallel.collectives import after, from_previous, gather, receive_previous, send_next
from rondo.parallel.config import Exchange

OPERATORS = ("scan", "conv", "attend", "total")
"""Attributes under which modules keep the operators that mix positions."""


def shard_sequence(
    model: nn.Module, group: dist.ProcessGroup, exchange: Exchange = "all_gather"
) -> None:
    """Replaces the operators of all modules of `model` by their forms over `group`."""
    for module in model.modules():
        for name in OPERATORS:
            if name in module.__dict__:
                setattr(module, name, over_ranks(module.__dict__[name], group, exchange))


def over_ranks(
    operator: Callable[..., Any], group: dist.ProcessGroup, exchange: Exchange = "all_gather"
) -> Callable[..., Any]:
    """The form of `operator`, of the same signature, in which each rank of `group` gives and gets
    its stretch `(B, T / P, ...)` of every row.

    States: of what is returned the last rank's is the state after the row, and as `initial_state`
    only the last rank's counts, so that states can be handed from call to call.

    `exchange`: how a linear recurrence's ranks learn of the state before their stretch. With
    "all_gather" all exchange summaries at once and each folds those before its own, with "ring"
    each receives the state itself and hands on the one after its stretch: one after another, but
    a rank never holds more than one summary and no transition travels.

    Raises ValueError for an operator that has no such form.
    """
    if operator in SUMMARIES:
        form = _RecurrenceOverRing if exchange == "ring" else _RecurrenceOverRanks
        return form(operator, group)
    if operator is short_conv:
        return _ConvOverRanks(group)
    if operator is attention:
        return attention_over_ranks(group)
    if operator is whole_sequence:
        return functools.partial(_sum_over_ranks, group)
    raise ValueError(f"{operator} has no sequence-parallel form; add its summary to SUMMARIES")


def _sum_over_ranks(group: dist.ProcessGroup, counts: Tensor) -> Tensor:
    total = counts.clone()
    dist.all_reduce(total, group=group)
    return total


class _RecurrenceOverRanks:
    """A linear recurrence, by an all-gather of summaries; see `over_ranks`."""

    def __init__(self, operator: Callable[..., Any], group: dist.ProcessGroup) -> None:
        self.operator, self.summarize, self.group = operator, SUMMARIES[operator], group

    def __call__(
        self,
        *tensors: Tensor,
        initial_state: Tensor | None = None,
        segment_ids: Tensor | None = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor]:
        rank = dist.get_rank(self.group)
        summary = self.summarize(*tensors, segment_ids=segment_ids)
        parts = [*summary] if initial_state is None else [*summary, initial_state]
        ids = None if segment_ids is None else segment_ids[:, [0, -1]]
        ranks = _exchange(parts, ids, self.group)
        # Every rank's gradients must take part in the exchange, also those that read nothing.
        nothing = torch.zeros((), dtype=torch.bool, device=summary.state.device)
        state = torch.where(nothing, ranks[0].parts[1], 0.0)
        if initial_state is not None:
            state = ranks[-1].parts[2]
        for before, here in itertools.pairwise(ranks[: rank + 1]):
            state = type(summary)(*before.parts[:2]).apply(state)
            if before.ids is not None and here.ids is not None:
                state = _if_same(before.ids[:, 1], here.ids[:, 0], state)
        return self.operator(*tensors, initial_state=state, segment_ids=segment_ids, **options)


class _RecurrenceOverRing(_RecurrenceOverRanks):
    """A linear recurrence, by handing its state from rank to rank; see `over_ranks`."""

    def __call__(
        self,
        *tensors: Tensor,
        initial_state: Tensor | None = None,
        segment_ids: Tensor | None = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor]:
        rank, size = dist.get_rank(self.group), dist.get_world_size(self.group)
        summary = self.summarize(*tensors, segment_ids=segment_ids)
        state = torch.zeros_like(summary.state)
        if initial_state is not None:
            last = from_previous(initial_state.to(state.dtype), self.group, cyclic=True)
            state = torch.where(torch.tensor(rank == 0, device=state.device), last, 0.0)
        if rank > 0:
            # The first rank's start is zero here, and only it has one.
            state = state + self._receive(summary.state, segment_ids)
        token = None if rank == size - 1 else self._send(summary.apply(state), segment_ids)
        o, last = self.operator(*tensors, initial_state=state, segment_ids=segment_ids, **options)
        return o if token is None else after(o, token), last

    def _send(self, state: Tensor, segment_ids: Tensor | None) -> Tensor:
        """Gives the state after this rank's stretch to the next; returns the token of it."""
        flat = state.flatten(1)
        if segment_ids is not None:
            flat = torch.cat((flat, _as_bits(segment_ids[:, -1:], flat.dtype)), 1)
        return send_next(flat, self.group)

    def _receive(self, like: Tensor, segment_ids: Tensor | None) -> Tensor:
        """The state before this rank's stretch; zero where its document begins here."""
        flat = like.flatten(1)
        if segment_ids is None:
            return receive_previous(flat, self.group).view(like.shape)
        bits = _as_bits(segment_ids[:, :1], flat.dtype)
        received = receive_previous(torch.cat((flat, bits), 1), self.group)
        state = received[:, : flat.shape[1]].view(like.shape)
        return _if_same(_as_ids(received[:, flat.shape[1] :])[:, 0], segment_ids[:, 0], state)


def _if_same(before: Tensor, here: Tensor, state: Tensor) -> Tensor:
    """`state` `(B, ...)` where the document `(B,)` before a border goes on after it, else zero."""
    return torch.where((before == here).view(-1, *(1,) * (state.ndim - 1)), state, 0.0)


class _Row:
    """What one rank gave: tensors `(B, ...)`, and the ids `(B, 2)` of its first and last token."""

    def __init__(self, parts: list[Tensor], ids: Tensor | None) -> None:
        self.parts, self.ids = parts, ids


def _exchange(parts: list[Tensor], ids: Tensor | None, group: dist.ProcessGroup) -> list[_Row]:
    """All ranks' `parts` and `ids`, in one all-gather."""
    batch, dtype = parts[0].shape[0], parts[0].dtype
    flat = [part.to(dtype).reshape(batch, -1) for part in parts]
    sizes = [part.shape[1] for part in flat]
    if ids is not None:
        flat.append(_as_bits(ids, dtype))
    rows = []
    for row in gather(torch.cat(flat, 1), group):
        split = row[:, : sum(sizes)].split(sizes, 1)
        values = [value.view(part.shape) for value, part in zip(split, parts, strict=True)]
        rows.append(_Row(values, None if ids is None else _as_ids(row[:, sum(sizes) :])))
    return rows


class _ConvOverRanks:
    """A short convolution: the last inputs of the rank before come first. See `over_ranks`."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def __call__(
        self,
        x: Tensor,
        weight: Tensor,
        *arguments: Any,
        initial_state: Tensor | None = None,
        segment_ids: Tensor | None = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor]:
        before = weight.shape[1] - 1
        if before > 0:
            initial_state = self._history(x, before, initial_state, segment_ids)
        return short_conv(
            x,
            weight,
            *arguments,
            initial_state=initial_state,
            segment_ids=segment_ids,
            **options,
        )

    def _history(
        self, x: Tensor, count: int, initial_state: Tensor | None, segment_ids: Tensor | None
    ) -> Tensor:
        """The `count` inputs before this rank's first, `(B, count, C)`; zero where they are of
        another document."""
        rank = dist.get_rank(self.group)
        start = x.new_zeros(x.shape[0], count, x.shape[2])
        if initial_state is not None:
            first = from_previous(initial_state.to(x.dtype), self.group, cyclic=True)
            start = torch.where(torch.tensor(rank == 0, device=x.device), first, 0.0)
        history, ids = start, None
        if segment_ids is not None:
            ids = segment_ids[:, :1].expand(-1, count)
        # A rank's stretch may be shorter than the history: then it comes from further back.
        for _ in range(-(-count // x.shape[1])):
            sent = [torch.cat((history, x), 1)[:, -count:]]
            if segment_ids is not None and ids is not None:
                own = torch.cat((ids, segment_ids), 1)[:, -count:]
                sent.append(_as_bits(own[..., None], x.dtype))
            received = from_previous(torch.cat(sent, -1), self.group)
            # The first rank receives zeros, and only it starts from anything else.
            history = start + received[..., : x.shape[2]]
            if ids is not None and rank > 0:
                ids = _as_ids(received[..., x.shape[2] :])[..., 0]
        if segment_ids is None or ids is None:
            return history
        return torch.where((ids == segment_ids[:, :1])[..., None], history, 0.0)


def _as_bits(ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Integers `(..., n)` as bit patterns of a floating-point type, to travel with numbers."""
    return ids.to(torch.int64 if dtype == torch.float64 else torch.int32).view(dtype)


def _as_ids(bits: Tensor) -> Tensor:
    """The inverse of `_as_bits`."""
    wide = bits.dtype == torch.float64
    return bits.detach().contiguous().view(torch.int64 if wide else torch.int32)
