"""A recurrence whose steps are sums over chunks of tokens, over ranks that add up.

Chunks follow each other, and a rank's stretch of a row holds only some of them. So tokens are dealt
out like cards: one all-to-all gives rank p the positions p, p + P, ... of every row, and with them
its part of every chunk, wherever documents begin. All ranks go through the chunks together: each
sums over its tokens, an all-reduce adds up the sums, and all take the same step (arXiv 2505.23884),
for which they divide among them the matrices to orthogonalise. Another all-to-all returns the
outputs. Gradients are exact: of what all ranks hold alike each has a share of the gradient, and the
backward pass of an all-reduce adds up the shares before they go on to tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rondo.kernels.fast_weights import Share
from rondo.kernels.fast_weights.checks import check_tokens
from rondo.parallel.collectives import after, all_reduce, all_to_all_rows, gather, gather_time


class SumsOverRanks:
    """An operator of `SUMS`, each of whose steps the ranks share; see `sequence.over_ranks`. The
    state returned is the same on all ranks."""

    def __init__(self, operator: Callable[..., Any], group: dist.ProcessGroup) -> None:
        self.operator, self.group = operator, group

    @torch.compiler.disable  # transfers cannot be traced: one graph break, not one each
    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        learning_rates: Tensor,
        weights: Any,
        *,
        momentum: Tensor | None = None,
        initial_state: Any = None,
        segment_ids: Tensor | None = None,
        **options: Any,
    ) -> tuple[Tensor, Any]:
        check_tokens(q, k, v, learning_rates, momentum)  # before they travel as one
        deal = _Deal(q.shape[1], self.group, q.device)
        tokens = deal.out([q.to(v.dtype), k.to(v.dtype), v])
        if momentum is None:
            rates, mixing = deal.out([learning_rates])[0], None
        else:
            rates, mixing = deal.out([learning_rates, momentum.to(learning_rates.dtype)])
        share = Share(
            deal.rank, deal.size, functools.partial(all_reduce, group=self.group), self._divide
        )
        o, state = self.operator(
            *tokens,
            rates,
            weights,
            momentum=mixing,
            initial_state=None if initial_state is None else self._of_last_rank(initial_state),
            segment_ids=None if segment_ids is None else gather_time(segment_ids, self.group),
            share=share,
            **options,
        )
        # Every rank's gradients must take part in all sums, also those that only states read.
        token = torch.stack([x.flatten()[0] for x in _numbers(state)])
        return after(deal.back(o), token), state

    def _divide(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """`function` of the matrices of `x` `(B, H, ., .)`, the same on all ranks: each rank takes
        its run of them."""
        rank, size = dist.get_rank(self.group), dist.get_world_size(self.group)
        matrices = x.flatten(0, 1)
        count = -(-len(matrices) // size)
        missing = matrices.new_zeros(count * size - len(matrices), *x.shape[2:])
        mine = torch.cat([matrices, missing])[rank * count : (rank + 1) * count]
        found = gather(function(mine), self.group).flatten(0, 1)
        return found[: len(matrices)].unflatten(0, x.shape[:2])

    def _of_last_rank(self, state: Any) -> Any:
        """The last rank's state, on all ranks."""
        last = dist.get_world_size(self.group) - 1
        here = torch.tensor(dist.get_rank(self.group) == last, device=state[0].device)
        numbers = _numbers(state)
        flat = torch.where(here, torch.cat([x.flatten() for x in numbers]), 0.0)
        parts = all_reduce(flat, self.group).split([x.numel() for x in numbers])
        found = iter([part.view(x.shape) for part, x in zip(parts, numbers, strict=True)])
        return type(state)._make(
            next(found) if x is not None and x.is_floating_point() else self._copied(x, last)
            for x in state
        )

    def _copied(self, counts: Tensor | None, source: int) -> Tensor | None:
        if counts is None:
            return None
        counts = counts.clone()
        dist.broadcast(counts, group=self.group, group_src=source)
        return counts


def _numbers(state: Any) -> list[Tensor]:
    return [x for x in state if x is not None and x.is_floating_point()]


class _Deal:
    """Deals positions out to ranks one by one, and back. A rank has `length` before and after,
    whether or not the ranks divide it."""

    def __init__(self, length: int, group: dist.ProcessGroup, device: torch.device) -> None:
        self.group, self.rank = group, dist.get_rank(group)
        self.size = dist.get_world_size(group)
        # How much each rank's stretch has for this rank, and this rank's for each.
        self.receive = [self._given(giver, self.rank, length) for giver in range(self.size)]
        self.send = [self._given(self.rank, taker, length) for taker in range(self.size)]
        positions = self.rank * length + torch.arange(length, device=device)
        self.order = (positions % self.size).argsort(stable=True)

    def _given(self, giver: int, taker: int, length: int) -> int:
        """Positions `giver * length + i` that are `taker` modulo the number of ranks."""
        return len(range((taker - giver * length) % self.size, length, self.size))

    def out(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Tensors `(B, L, ...)` of one dtype, of this rank's stretch; of positions `rank`,
        `rank + P`, ... instead. They travel as one."""
        flat = torch.cat([x.flatten(2) for x in tensors], -1).transpose(0, 1)
        rows = flat.index_select(0, self.order)
        dealt = all_to_all_rows(rows, self.send, self.receive, self.group).transpose(0, 1)
        parts = dealt.split([x[0, 0].numel() for x in tensors], -1)
        return [part.unflatten(2, x.shape[2:]) for part, x in zip(parts, tensors, strict=True)]

    def back(self, x: Tensor) -> Tensor:
        """The inverse of `out`, for one tensor."""
        rows = x.transpose(0, 1).flatten(1)
        dealt = all_to_all_rows(rows, self.receive, self.send, self.group)
        rows = dealt.index_select(0, self.order.argsort())
        return rows.view(x.shape[1], x.shape[0], *x.shape[2:]).transpose(0, 1)
