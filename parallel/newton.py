"""A recurrence that Newton's method solves, over ranks: each holds its stretch of the trajectory.

An iteration maps the state before a stretch affinely to the one after it (`kernels.newton_rnn`).
Ranks exchange these maps in one all-gather an iteration, whose size does not depend on the length;
each folds those of the ranks before its own, and so knows the next guess of the state before its
stretch. The gradient takes one exchange more, the other way round. How to go on is decided from the
largest figures of all ranks, alike on each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rondo.kernels.newton_rnn.neighbours import Summary
from rondo.parallel.collectives import from_previous, gather
from rondo.parallel.summaries import SummaryExchange


class NewtonOverRanks:
    """An operator of `SOLVED`, of the same signature; see `sequence.over_ranks`."""

    def __init__(self, operator: Callable[..., Any], group: dist.ProcessGroup) -> None:
        self.operator, self.group = operator, group

    @torch.compiler.disable  # transfers cannot be traced: one graph break, not one each
    def __call__(
        self,
        cell: Any,
        gates: Tensor,
        recurrent: Tensor,
        *,
        initial_state: Tensor | None = None,
        segment_ids: Tensor | None = None,
        **options: Any,
    ) -> Any:
        if initial_state is not None:  # the last rank's is the first one's
            wide = torch.promote_types(gates.dtype, torch.float32)
            before = from_previous(initial_state.to(wide), self.group, cyclic=True)
            first = torch.tensor(dist.get_rank(self.group) == 0, device=gates.device)
            initial_state = torch.where(first, before, 0.0)
        return self.operator(
            cell,
            gates,
            recurrent,
            initial_state=initial_state,
            segment_ids=segment_ids,
            neighbours=RankNeighbours(segment_ids, self.group),
            **options,
        )


class RankNeighbours:
    """`kernels.newton_rnn.Neighbours` that are the ranks of a group, in order; to be made by all
    of them together, with the `segment_ids` `(B, T)` of their stretches."""

    def __init__(self, segment_ids: Tensor | None, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank, self.count = dist.get_rank(group), dist.get_world_size(group)
        self._starts: Tensor | None = None
        self._ends: Tensor | None = None
        if segment_ids is not None:
            ids = gather(segment_ids[:, [0, -1]].contiguous(), group)
            border = ids[1:, :, 0] != ids[:-1, :, 1]  # where a document begins with a stretch
            self._starts = border[self.rank - 1] if self.rank > 0 else None
            self._ends = border[self.rank] if self.rank < self.count - 1 else None

    def before(self, summary: Summary, first: Tensor) -> Tensor:
        """See `Neighbours.before`; only the first rank's `first` counts."""
        if self.rank == 0:
            summary = _from(summary, first)
        ranks = self._exchange(_without(summary, self._ends))
        state = first if self.rank == 0 else ranks[0].state
        for each in ranks[1 : self.rank]:
            state = each.apply(state)
        return state

    def after(self, summary: Summary, last: Tensor) -> Tensor:
        """See `Neighbours.after`; only the last rank's `last` counts."""
        if self.rank == self.count - 1:
            summary = _from(summary, last)
        ranks = self._exchange(_without(summary, self._starts))
        grad = last if self.rank == self.count - 1 else ranks[-1].state
        for each in reversed(ranks[self.rank + 1 : -1]):
            grad = each.apply(grad)
        return grad

    def agree(self, figures: Tensor) -> Tensor:
        """See `Neighbours.agree`. What is not a number counts as infinite: the largest of it and
        others would depend on their order."""
        largest = torch.nan_to_num(figures, nan=torch.inf, posinf=torch.inf)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.group)
        return largest

    def _exchange(self, summary: Summary) -> list[Summary]:
        ranks = SummaryExchange(summary, None, None, self.group).finish()
        return [type(summary)(*each.parts) for each in ranks]


def _from(summary: Summary, state: Tensor) -> Summary:
    """The map to where `state` leads, whatever comes."""
    return type(summary)(torch.zeros_like(summary.transition), summary.apply(state))


def _without(summary: Summary, rows: Tensor | None) -> Summary:
    """The same, but for `rows` `(B,)`, of which nothing is passed on."""
    if rows is None:
        return summary
    parts = (x.masked_fill(rows.view(-1, *(1,) * (x.dim() - 1)), 0.0) for x in summary)
    return type(summary)(*parts)
