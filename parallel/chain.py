"""A nonlinear recurrence over ranks: its state travels from rank to rank.

What a stretch of tokens does to any state cannot be told in advance, so that ranks work one after
another; but rows, and heads, know nothing of each other. They are taken in parts: while a rank
works on one, the rank before it works on the next. With P ranks and n parts, a pass takes
n + P - 1 turns, of which a rank is idle for P - 1. Parts are at most 2 P (more would idle less, but
are smaller), and no more than rows times heads: one row of 8 heads over 8 ranks idles for 7 of 15.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rondo.kernels.recurrences import CHAINS
from rondo.parallel.collectives import after, from_previous, receive_previous, send_next
from rondo.parallel.summaries import as_bits, as_ids


class ChainOverRanks:
    """An operator of `CHAINS`, whose state each rank receives and hands on; see
    `sequence.over_ranks`. States are `(numbers (B, H, ...), counts (B,))`."""

    def __init__(self, operator: Callable[..., Any], group: dist.ProcessGroup) -> None:
        self.operator, self.fresh, self.group = operator, CHAINS[operator], group

    def __call__(
        self,
        *tensors: Any,
        initial_state: Any = None,
        segment_ids: Tensor | None = None,
        **options: Any,
    ) -> Any:
        numbers, counts = (None, None) if initial_state is None else initial_state
        rows, heads = tensors[0].shape[0], tensors[0].shape[2]
        by_rows, by_heads = parts(rows, heads, dist.get_world_size(self.group))
        stretches = zip(
            zip(*(_cut(x, by_rows, 0) for x in tensors), strict=True),
            *(_cut(x, by_rows, 0) for x in (numbers, counts, segment_ids)),
            strict=True,
        )
        found = []
        for x, n, c, ids in stretches:
            by_head = zip(
                zip(*(_cut(y, by_heads, 2) for y in x), strict=True),
                _cut(n, by_heads, 1),
                strict=True,
            )
            done = [self._run(y, m, c, ids, **options) for y, m in by_head]
            found.append(_joined(done, heads=True))
        return _joined(found, heads=False)

    def _run(
        self,
        tensors: tuple[Any, ...],
        numbers: Tensor | None,
        counts: Tensor | None,
        segment_ids: Tensor | None,
        **options: Any,
    ) -> Any:
        """One part: its state comes, is moved past this rank's stretch, and goes."""
        rank, size = dist.get_rank(self.group), dist.get_world_size(self.group)
        fresh, state = self.fresh(*tensors, **options), None
        if numbers is not None and counts is not None:  # the last rank's is the first one's
            flat = from_previous(_pack(numbers, counts), self.group, cyclic=True)
            state = _unpack(flat, fresh)
        if rank > 0:
            first, state = state, self._receive(fresh, segment_ids, tensors[0])
            if first is not None:
                # Every rank's gradients must take part, also those that read nothing.
                nothing = torch.zeros(len(first[1]), dtype=torch.bool, device=first[1].device)
                state = _where(nothing, first, state)
        found = self.operator(*tensors, initial_state=state, segment_ids=segment_ids, **options)
        if rank == size - 1:
            return found
        ids = () if segment_ids is None else (segment_ids[:, -1],)
        return found._replace(o=after(found.o, send_next(_pack(*found.state, *ids), self.group)))

    def _receive(self, fresh: Any, segment_ids: Tensor | None, x: Tensor) -> Any:
        """The state before this rank's stretch; the fresh one where its document begins here. A
        backward pass to `x` alone must answer the rank before too."""
        ids = () if segment_ids is None else (segment_ids[:, 0],)
        flat = receive_previous(_pack(*fresh, *ids).detach() + x.flatten()[0], self.group)
        state = _unpack(flat, fresh)
        if segment_ids is None:
            return state
        return _where(as_ids(flat[:, -1:])[:, 0] == segment_ids[:, 0], state, fresh)


def parts(rows: int, heads: int, ranks: int) -> tuple[int, int]:
    """Parts of rows and of heads, together about twice as many as ranks where there are so many."""
    by_rows = min(2 * ranks, rows)
    return by_rows, min(-(-2 * ranks // by_rows), heads)


def _joined(parts: list[Any], *, heads: bool) -> Any:
    """One output of the operator from those of parts of its heads, or of its rows."""
    o, states, limited = zip(*parts, strict=True)
    numbers, counts = zip(*states, strict=True)
    dim = 1 if heads else 0
    state = type(states[0])(torch.cat(numbers, dim), counts[0] if heads else torch.cat(counts))
    return type(parts[0])(torch.cat(o, 2 * dim), state, torch.cat(limited, dim))


def _cut(x: Any, parts: int, dim: int | None) -> list[Any]:
    """`x` in parts along `dim`, or all of it for each; weights `(H, ...)`, a tuple, by heads."""
    if isinstance(x, tuple):
        return list(zip(*(_cut(w, parts, 0 if dim else None) for w in x), strict=True))
    return [x] * parts if x is None or dim is None else list(x.tensor_split(parts, dim))


def _where(rows: Tensor, yes: Any, no: Any) -> Any:
    wide = rows.view(-1, *(1,) * (yes[0].dim() - 1))
    return type(yes)(torch.where(wide, yes[0], no[0]), torch.where(rows, yes[1], no[1]))


def _pack(numbers: Tensor, *integers: Tensor) -> Tensor:
    """`(B, n)`: all of it, integers `(B,)` as bit patterns."""
    return torch.cat(
        [numbers.flatten(1), *(as_bits(x[:, None], numbers.dtype) for x in integers)], 1
    )


def _unpack(flat: Tensor, like: Any) -> Any:
    """The state in what `_pack` made."""
    size = like[0][0].numel()
    counts = as_ids(flat[:, size : size + 1])[:, 0].long()
    return type(like)(flat[:, :size].view(like[0].shape), counts)
