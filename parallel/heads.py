"""A strictly sequential recurrence over ranks: stretches are traded for heads.

What a stretch of tokens does to a state cannot be told without running it, but heads know nothing
of each other. One all-to-all gives each rank whole rows of its share of the heads, one gives it
its stretch back for all of them. If ranks do not divide the heads, heads of zeros fill up.

B batch, L positions a rank, P ranks, H heads, n heads a rank, G gates, D width, S states.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from rondo.parallel.collectives import after, all_to_all, gather


class HeadsOverRanks:
    """An operator of `HEADS`, for all tokens of some heads; see `sequence.over_ranks`."""

    def __init__(self, operator: Callable[..., Any], group: dist.ProcessGroup) -> None:
        self.operator, self.group = operator, group

    @torch.compiler.disable  # transfers cannot be traced: one graph break, not one each
    def __call__(
        self,
        cell: str,
        gates: Tensor,
        recurrent: Tensor,
        *,
        bias: Tensor | None = None,
        initial_state: Tensor | None = None,
        segment_ids: Tensor | None = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor]:
        heads, rank = gates.shape[3], dist.get_rank(self.group)
        stretches = all_to_all(self._shares(gates, 3), self.group)  # (P, B, L, G, n, D)
        if initial_state is not None:  # the last rank's counts
            initial_state = all_to_all(self._shares(initial_state, 2), self.group)[-1]
        h, state = self.operator(
            cell,
            stretches.transpose(0, 1).flatten(1, 2),
            self._shares(recurrent, 1)[rank],
            bias=None if bias is None else self._shares(bias, 1)[rank],
            initial_state=initial_state,
            segment_ids=self._whole_rows(segment_ids),
            **options,
        )
        size = dist.get_world_size(self.group)
        mine = all_to_all(h.unflatten(1, (size, -1)).transpose(0, 1), self.group)
        states = gather(state, self.group)
        # Every rank's gradients must take part, also those of ranks whose state nobody reads.
        h = after(mine, states).movedim(0, 2).flatten(2, 3)[:, :, :heads]
        return h, states.movedim(0, 2).flatten(2, 3)[:, :, :heads]

    def _shares(self, x: Tensor, dim: int) -> Tensor:
        """Heads at `dim` in P runs, which become the first dimension."""
        size = dist.get_world_size(self.group)
        x = F.pad(x, (0, 0) * (x.dim() - 1 - dim) + (0, -x.shape[dim] % size))
        return x.unflatten(dim, (size, -1)).movedim(dim, 0)

    def _whole_rows(self, segment_ids: Tensor | None) -> Tensor | None:
        return (
            None
            if segment_ids is None
            else gather(segment_ids, self.group).movedim(0, 1).flatten(1)
        )
