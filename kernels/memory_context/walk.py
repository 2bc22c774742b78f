"""Pieces of segments one after another, and what is handed from one to the next."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rondo.kernels.memory_context.segments import Segments
from rondo.kernels.neural_memory import MemoryState, neural_memory
from rondo.kernels.neural_memory.layers import recall, sizes, split
from rondo.kernels.norms import l2_norm
from rondo.kernels.softmax_attention import attention
from rondo.kernels.tiles import values_are_known

Weights = tuple[Tensor, ...]


class ContextState(NamedTuple):
    """What is handed on, at any token."""

    values: Tensor
    """`(B, H, N)`, float32 (float64 for float64 inputs): the memory (`MemoryState.values`), its
    weights where the open segment began, and the last `segment_size - 1` recalled keys and values,
    zero where they are of earlier segments."""
    count: Tensor
    """`(B,)` int64: tokens of the open segment so far, `segment_size` when it is complete; 0 only
    before a document's first token."""


class Open(NamedTuple):
    """The open segments: a memory, and what it recalled in them."""

    memory: MemoryState
    start: Tensor  # (B, H, P): weights where the segment began
    keys: Tensor  # (B, segment_size - 1, H, D)
    values: Tensor  # (B, segment_size - 1, H, D)
    count: Tensor  # (B,)


class Walk:
    """Pieces of segments, one after another."""

    def __init__(
        self,
        recalled: Weights,
        learned: Weights,
        weights: Weights,
        segment_size: int,
        options: dict[str, Any],
        backend: str,
    ) -> None:
        self.recalled, self.learned, self.weights = recalled, learned, weights
        self.segment_size, self.options, self.backend = segment_size, options, backend

    def __call__(
        self, piece: Segments, tokens: list[Tensor], now: Open, fresh: Open
    ) -> tuple[Tensor, Open, Tensor]:
        """Outputs `(B, n, H, 2 D)` of one piece, what is open after it, and how often a limit
        acted."""
        q, o, lse, r, rate, momentum, decay = tokens
        now = _begin(piece, now, fresh)
        k, v = self._recall(now.start, r, o.dtype)
        y = self._attend(piece, q, o, lse, k, v, now)
        of_y = [F.silu(_project(y, w)) for w in self.learned]
        found = neural_memory(
            l2_norm(of_y[0]),
            l2_norm(of_y[1]),
            of_y[2],
            rate,
            momentum,
            decay,
            self.weights,
            initial_state=now.memory,
            at_border=piece.fresh,
            backend=self.backend,
            **self.options,
        )
        after = Open(
            found.state,
            now.start,
            torch.cat([now.keys, k.to(now.keys.dtype)], 1)[:, k.shape[1] :],
            torch.cat([now.values, v.to(now.values.dtype)], 1)[:, v.shape[1] :],
            now.count + k.shape[1],
        )
        return torch.cat([y, found.o], -1).to(o.dtype), after, found.limited

    def _recall(self, start: Tensor, r: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values `(B, n, H, D)` of what the memory recalls."""
        matrices = split(start, self.weights)
        r = r.to(start.dtype).transpose(1, 2)
        h = recall(matrices, r, self.options["residual"]).transpose(1, 2)
        k, v = (_project(h, w) for w in self.recalled)
        return (l2_norm(k) * k.shape[-1] ** 0.5).to(dtype), v.to(dtype)

    def _attend(
        self,
        piece: Segments,
        q: Tensor,
        o: Tensor,
        lse: Tensor,
        k: Tensor,
        v: Tensor,
        now: Open,
    ) -> Tensor:
        """y, in the dtype of the memory: recalled keys joined to those behind `o`, `lse`."""
        here = keys_here = None
        if not piece.fresh:
            width = now.keys.shape[1]
            live = torch.arange(width, device=q.device) >= width - now.count[:, None]
            here = torch.ones_like(q[:, :, 0, 0], dtype=torch.int64)
            keys_here = torch.cat([live.long(), here], 1)
            k = torch.cat([now.keys.to(k.dtype), k], 1)
            v = torch.cat([now.values.to(v.dtype), v], 1)
        more, more_lse = attention(
            q.to(k.dtype),
            k,
            v,
            segment_ids=here,
            key_segment_ids=keys_here,
            return_lse=True,
            backend=self.backend,
        )
        kind = now.start.dtype
        lse, more_lse = lse.to(kind), more_lse.to(kind)
        total = torch.logaddexp(lse, more_lse)
        shares = (lse - total).exp()[..., None], (more_lse - total).exp()[..., None]
        return o.to(kind) * shares[0] + more.to(kind) * shares[1]


def _begin(piece: Segments, now: Open, fresh: Open) -> Open:
    """What is open as the piece begins: a fresh memory in a new document, a new segment's start."""
    memory, start, keys, values, count = now
    if piece.begins is not None:
        rows = piece.begins[:, None, None, None]
        memory = MemoryState(
            torch.where(rows, fresh.memory.values, memory.values),
            torch.where(piece.begins, fresh.memory.done, memory.done),
        )
    if piece.renews is None:
        return now._replace(memory=memory)
    rows = piece.renews[:, None, None]
    start = torch.where(rows, memory.values[:, :, 1], start)
    keys, values = (torch.where(rows[..., None], 0.0, x) for x in (keys, values))
    return Open(memory, start, keys, values, torch.where(piece.renews, 0, count))


def _project(x: Tensor, w: Tensor) -> Tensor:
    """`W x` of every head: `(B, n, H, D)` by `(H, D, D)`, in the dtype of x."""
    return torch.einsum("bthd,hed->bthe", x, w.to(x.dtype))


def pack(now: Open) -> ContextState:
    """The state to hand on."""
    keys, values = (x.transpose(1, 2).flatten(2) for x in (now.keys, now.values))
    flat = torch.cat([now.memory.values.flatten(2), now.start, keys, values], -1)
    return ContextState(flat, now.count)


def unpack(
    state: ContextState, q: Tensor, weights: Weights, segment_size: int, chunk_size: int
) -> Open:
    """The inverse of `pack`, for rows as `q`. Raises ValueError for a state that does not fit."""
    kind = torch.promote_types(q.dtype, torch.float32)
    numbers, width = sizes(weights), (segment_size - 1) * q.shape[-1]
    values, count = state.values.to(kind), state.count
    expected = (q.shape[0], q.shape[2], 4 * numbers + 2 * width)
    if tuple(values.shape) != expected:
        raise ValueError(
            f"initial_state.values has shape {tuple(values.shape)}, expected (B, H, N) = {expected}"
        )
    if values_are_known(count) and count.max() > segment_size:
        raise ValueError(
            f"initial_state.count has {int(count.max())} tokens of a segment: the state was made "
            f"with another segment_size than {segment_size}"
        )
    memory, start, k, v = values.split([3 * numbers, numbers, width, width], -1)
    done = torch.where(count > 0, (count - 1) % chunk_size + 1, 0)
    keys, values = (x.unflatten(2, (-1, q.shape[-1])).transpose(1, 2) for x in (k, v))
    return Open(MemoryState(memory.unflatten(2, (3, -1)), done), start, keys, values, count)
