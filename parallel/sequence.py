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
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rondo.kernels import attention, short_conv
from rondo.kernels.recurrences import CHAINS, HEADS, SOLVED, STRETCHES, SUMMARIES, SUMS
from rondo.kernels.summary import Stretch
from rondo.models.ffn.dispatch import over_capacity, whole_sequence
from rondo.parallel.attention import attention_over_ranks
from rondo.parallel.capacity import capacity_over_ranks
from rondo.parallel.chain import ChainOverRanks
from rondo.parallel.collectives import (
    after,
    from_previous,
    receive_previous,
    send_next,
)
from rondo.parallel.config import Exchange
from rondo.parallel.fast_weights import SumsOverRanks
from rondo.parallel.heads import HeadsOverRanks
from rondo.parallel.newton import NewtonOverRanks
from rondo.parallel.summaries import SummaryExchange, as_bits, as_ids, if_same

Finish = Callable[[Tensor], tuple[Tensor, Tensor]]

OPERATORS = ("scan", "conv", "attend", "total", "drop")
"""Attributes under which modules keep the operators that mix positions."""

_LONG = 2**20
"""Numbers in an operand from which on halves take no longer than the whole, nothing hidden."""


def shard_sequence(
    model: nn.Module, group: dist.ProcessGroup, exchange: Exchange = "all_gather"
) -> None:
    """Replaces the operators of all modules of `model` by their forms over `group`."""
    for module in model.modules():
        for name in OPERATORS:
            if name in module.__dict__:
                setattr(module, name, over_ranks(module.__dict__[name], group, exchange))


def has_chain(module: nn.Module) -> bool:
    """Whether an operator of its own hands a state from rank to rank (`chain.py`)."""
    return any(module.__dict__.get(name) in CHAINS for name in OPERATORS)


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
    if operator in CHAINS:
        return ChainOverRanks(operator, group)
    if operator in SUMS:
        return SumsOverRanks(operator, group)
    if operator in SOLVED:
        return NewtonOverRanks(operator, group)
    if operator in HEADS:
        return HeadsOverRanks(operator, group)
    if operator is short_conv:
        return _ConvOverRanks(group)
    if operator is attention:
        return attention_over_ranks(group)
    if operator is whole_sequence:
        return functools.partial(_sum_over_ranks, group)
    if operator is over_capacity:
        return functools.partial(capacity_over_ranks, group)
    raise ValueError(
        f"{operator} has no sequence-parallel form; add it to SUMMARIES, CHAINS, SUMS, SOLVED or "
        "HEADS"
    )


def _sum_over_ranks(group: dist.ProcessGroup, counts: Tensor) -> Tensor:
    total = counts.clone()
    dist.all_reduce(total, group=group)
    return total


class _RecurrenceOverRanks:
    """A linear recurrence, by an all-gather of summaries; see `over_ranks`.

    Rows, or else heads, of long stretches are taken in two halves that know nothing of each other:
    one's exchange is under way while the other is computed, forward and backward."""

    def __init__(self, operator: Callable[..., Any], group: dist.ProcessGroup) -> None:
        self.operator, self.summarize, self.group = operator, SUMMARIES[operator], group

    def __call__(
        self,
        *tensors: Tensor,
        initial_state: Tensor | None = None,
        segment_ids: Tensor | None = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor]:
        halves, dims = _halves(tensors, initial_state, segment_ids)
        started = [self._start(half, options) for half in halves]
        results = [
            finish(self._state_before(half, exchange))
            for half, (finish, exchange) in zip(halves, started, strict=True)
        ]
        if len(results) == 1:
            return results[0]
        outputs, states = zip(*results, strict=True)
        return torch.cat(outputs, dims[0]), torch.cat(states, dims[1])

    def _begin(
        self,
        tensors: tuple[Tensor | None, ...],
        segment_ids: Tensor | None,
        options: dict[str, Any],
    ) -> Stretch:
        """By kernels that serve summary and outputs alike, or else each for itself."""
        begin = STRETCHES.get(self.operator)
        given = {"segment_ids": segment_ids, **options}
        stretch = None if begin is None else begin(*tensors, **given)
        if stretch is not None:
            return stretch

        def finish(state: Tensor) -> tuple[Tensor, Tensor]:
            return self.operator(*tensors, initial_state=state, **given)

        return Stretch(self.summarize(*tensors, segment_ids=segment_ids), finish)

    def _start(self, half: _Half, options: dict[str, Any]) -> tuple[Finish, SummaryExchange]:
        summary, finish = self._begin(half.tensors, half.segment_ids, options)
        ids = None if half.segment_ids is None else half.segment_ids[:, [0, -1]]
        return finish, SummaryExchange(summary, half.initial_state, ids, self.group)

    def _state_before(self, half: _Half, exchange: SummaryExchange) -> Tensor:
        """The state before this rank's stretch."""
        rank, ranks = dist.get_rank(self.group), exchange.finish()
        # Every rank's gradients must take part in the exchange, also those that read nothing.
        nothing = torch.zeros((), dtype=torch.bool, device=ranks[0].parts[1].device)
        state = torch.where(nothing, ranks[0].parts[1], 0.0)
        if half.initial_state is not None:
            state = ranks[-1].parts[2]
        for before, here in itertools.pairwise(ranks[: rank + 1]):
            state = exchange.kind(*before.parts[:2]).apply(state)
            if before.ids is not None and here.ids is not None:
                state = if_same(before.ids[:, 1], here.ids[:, 0], state)
        return state


class _Half(NamedTuple):
    """Operands of an operator for some of its rows or heads."""

    tensors: tuple[Tensor | None, ...]
    initial_state: Tensor | None
    segment_ids: Tensor | None


def _halves(
    tensors: tuple[Tensor, ...], initial_state: Tensor | None, segment_ids: Tensor | None
) -> tuple[list[_Half], tuple[int, int]]:
    """Operands in two halves, or one where that gains nothing, and the dimensions along which
    outputs `(B, T, H, ...)` and states `(B, H, ...)` are cut. Tensors with one head for all heads
    go to both halves."""
    first, by_rows = tensors[0], tensors[0].shape[0] > 1
    heads = {x.shape[2] for x in tensors if x is not None} - {1}
    by_heads = bool(heads) and all(count % 2 == 0 for count in heads) and first.dim() > 3
    dims = (0, 0) if by_rows else (2, 1)
    # The compiler cannot follow what is under way.
    gains = first.numel() >= _LONG and not torch.compiler.is_compiling()
    if not (gains and (by_rows or by_heads)):
        return [_Half(tensors, initial_state, segment_ids)], dims
    ids = _cut(segment_ids, 0) if by_rows else [segment_ids] * 2
    parts = zip(*(_cut(x, dims[0]) for x in tensors), strict=True)
    return [
        _Half(*half) for half in zip(parts, _cut(initial_state, dims[1]), ids, strict=True)
    ], dims


def _cut(x: Tensor | None, dim: int) -> list[Tensor | None]:
    if x is None or x.shape[dim] == 1:
        return [x, x]
    return list(x.split(-(-x.shape[dim] // 2), dim))


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
        summary, finish = self._begin(tensors, segment_ids, options)
        state = torch.zeros_like(summary.state)
        if initial_state is not None:
            last = from_previous(initial_state.to(state.dtype), self.group, cyclic=True)
            state = torch.where(torch.tensor(rank == 0, device=state.device), last, 0.0)
        if rank > 0:
            # The first rank's start is zero here, and only it has one.
            state = state + self._receive(summary.state, segment_ids)
        token = None if rank == size - 1 else self._send(summary.apply(state), segment_ids)
        o, last = finish(state)
        return o if token is None else after(o, token), last

    def _send(self, state: Tensor, segment_ids: Tensor | None) -> Tensor:
        """Gives the state after this rank's stretch to the next; returns the token of it."""
        flat = state.flatten(1)
        if segment_ids is not None:
            flat = torch.cat((flat, as_bits(segment_ids[:, -1:], flat.dtype)), 1)
        return send_next(flat, self.group)

    def _receive(self, like: Tensor, segment_ids: Tensor | None) -> Tensor:
        """The state before this rank's stretch; zero where its document begins here."""
        flat = like.flatten(1)
        if segment_ids is None:
            return receive_previous(flat, self.group).view(like.shape)
        bits = as_bits(segment_ids[:, :1], flat.dtype)
        received = receive_previous(torch.cat((flat, bits), 1), self.group)
        state = received[:, : flat.shape[1]].view(like.shape)
        return if_same(as_ids(received[:, flat.shape[1] :])[:, 0], segment_ids[:, 0], state)


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
                sent.append(as_bits(own[..., None], x.dtype))
            received = from_previous(torch.cat(sent, -1), self.group)
            # The first rank receives zeros, and only it starts from anything else.
            history = start + received[..., : x.shape[2]]
            if ids is not None and rank > 0:
                ids = as_ids(received[..., x.shape[2] :])[..., 0]
        if segment_ids is None or ids is None:
            return history
        return torch.where((ids == segment_ids[:, :1])[..., None], history, 0.0)
