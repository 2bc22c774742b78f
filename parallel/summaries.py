"""What ranks tell each other about their stretches of rows: summaries and document ids."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from rondo.kernels.summary import DiagonalSummary, LogSummary, MatrixSummary
from rondo.parallel.collectives import start_gather


class Stretch(NamedTuple):
    """What one rank gave."""

    parts: list[Tensor]
    """A summary's transition and state, and an initial state where there is one: `(B, ...)`."""
    ids: Tensor | None
    """`(B, 2)`, of its first and last token."""


class SummaryExchange:
    """All ranks' summaries, initial states and `ids` `(B, 2)`, in one all-gather that starts when
    this is made."""

    def __init__(
        self,
        summary: DiagonalSummary | MatrixSummary | LogSummary,
        initial_state: Tensor | None,
        ids: Tensor | None,
        group: dist.ProcessGroup,
    ) -> None:
        self.kind = type(summary)
        parts = [*summary] if initial_state is None else [*summary, initial_state]
        self.shapes, self.has_ids = [part.shape for part in parts], ids is not None
        dtype = parts[0].dtype
        flat = [part.to(dtype).flatten(1) for part in parts]
        self.sizes = [part.shape[1] for part in flat]
        if ids is not None:
            flat.append(as_bits(ids, dtype))
        self.wait = start_gather(torch.cat(flat, 1), group)

    def finish(self) -> list[Stretch]:
        """What each rank gave, in order; waits for it."""
        rows, numbers = [], sum(self.sizes)
        for row in self.wait():
            split = zip(row[:, :numbers].split(self.sizes, 1), self.shapes, strict=True)
            values = [value.view(shape) for value, shape in split]
            rows.append(Stretch(values, as_ids(row[:, numbers:]) if self.has_ids else None))
        return rows


def if_same(before: Tensor, here: Tensor, state: Tensor) -> Tensor:
    """`state` `(B, ...)` where the document `(B,)` before a border goes on after it, else zero."""
    return torch.where((before == here).view(-1, *(1,) * (state.ndim - 1)), state, 0.0)


def as_bits(ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Integers `(..., n)` as bit patterns of a floating-point type, to travel with numbers."""
    return ids.to(torch.int64 if dtype == torch.float64 else torch.int32).view(dtype)


def as_ids(bits: Tensor) -> Tensor:
    """The inverse of `as_bits`."""
    wide = bits.dtype == torch.float64
    return bits.detach().contiguous().view(torch.int64 if wide else torch.int32)
