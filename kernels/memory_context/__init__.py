"""Memory as context: what a neural memory recalls joins the attention of a segment, and the memory
learns from what that attention finds (MAC, arXiv 2501.00663, section 4.1).

A document is cut into segments of `segment_size` tokens. For token t of the segment that starts
at s, per head, with M the weights of a memory as in `kernels.neural_memory`:

    h_t = M_s(r_t)                                    recalled with the memory before the segment
    y_t = softmax attention of q_t to the keys behind (o_t, lse_t) and to
          k_j = sqrt(D) W_k h_j / |W_k h_j|,  v_j = W_v h_j     for s <= j <= t
    M takes a step on u(SiLU(W_K y_t)) -> SiLU(W_V y_t), u making unit norm
    m_t = M_t(u(SiLU(W_Q y_t)))

`o`, `lse` are attention to whatever else a token sees: its segment and persistent tokens. All
projections are of single heads, so that heads know nothing of each other.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rondo.kernels.backend import full_precision
from rondo.kernels.memory_context.segments import Segments, pieces
from rondo.kernels.neural_memory import MemoryState, fresh_memory, neural_memory
from rondo.kernels.neural_memory.layers import recall, sizes, split
from rondo.kernels.norms import l2_norm
from rondo.kernels.softmax_attention import attention
from rondo.kernels.tiles import values_are_known

__all__ = ["ContextOutput", "ContextState", "fresh_context", "memory_context"]

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


class ContextOutput(NamedTuple):
    """What `memory_context` returns."""

    o: Tensor
    """`(B, T, H, 2 D)` in the dtype of o: y and m side by side."""
    state: ContextState
    """After the last token."""
    limited: Tensor
    """`(B, H)` int64: how often a limit of the memory acted."""


class _Open(NamedTuple):
    """The open segments: a memory, and what it recalled in them."""

    memory: MemoryState
    start: Tensor  # (B, H, P): weights where the segment began
    keys: Tensor  # (B, segment_size - 1, H, D)
    values: Tensor  # (B, segment_size - 1, H, D)
    count: Tensor  # (B,)


@torch.compiler.disable  # pieces are of many lengths: one graph break, not a graph for each
def memory_context(
    q: Tensor,
    o: Tensor,
    lse: Tensor,
    r: Tensor,
    learning_rate: Tensor,
    log_momentum: Tensor,
    log_decay: Tensor,
    recalled: Weights,
    learned: Weights,
    weights: Weights,
    *,
    segment_size: int,
    chunk_size: int = 16,
    residual: bool = True,
    max_update: float = 10.0,
    max_weight: float = 100.0,
    initial_state: ContextState | None = None,
    segment_ids: Tensor | None = None,
    backend: str = "auto",
) -> ContextOutput:
    """Runs attention with recalled keys, and the memory behind it, over every row.

    Args:
        q, r: `(B, T, H, D)`: queries of attention and of the memory; r of unit norm.
        o, lse: `(B, T, H, D)` and `(B, T, H)`: attention of q to other keys, with its log-sum-exp.
        learning_rate, log_momentum, log_decay: `(B, T, H)`, as in `neural_memory`.
        recalled: `(H, D, D)` each, `(out, in)`: W_k, W_v.
        learned: `(H, D, D)` each: W_Q, W_K, W_V.
        weights: the memory of a new document, as in `neural_memory`; D into D.
        segment_size: tokens of a segment, a multiple of chunk_size. Part of the model.
        chunk_size, residual, max_update, max_weight: as in `neural_memory`.
        initial_state: of the document of position 0.
        segment_ids: `(B, T)` integers, non-decreasing in a row, one id a document.
        backend: of the operators inside, "auto", "reference" (one token at a time) or "chunked".

    Raises:
        ValueError: a shape or size does not fit.
    """
    _check(q, o, lse, r, recalled, learned, segment_size, chunk_size)
    tensors = (q, o, lse, r, learning_rate, log_momentum, log_decay)
    fresh = fresh_context(*tensors, recalled, learned, weights, segment_size=segment_size)
    options = {
        "residual": residual,
        "max_update": max_update,
        "max_weight": max_weight,
        "chunk_size": chunk_size,
    }
    walk = _Walk(recalled, learned, weights, segment_size, options, backend)
    longest = 1 if backend == "reference" else segment_size
    count = None if initial_state is None else initial_state.count
    plan = pieces(q.shape[:2], segment_size, longest, segment_ids, count, q.device)
    first = _unpack(fresh, q, weights, segment_size, chunk_size)
    now, outputs = first, []
    limited = torch.zeros(q.shape[0], q.shape[2], dtype=torch.int64, device=q.device)
    if initial_state is not None:
        now = _unpack(initial_state, q, weights, segment_size, chunk_size)
    with full_precision(q.device):  # a memory's steps are small
        for piece in plan:
            part = slice(piece.start, piece.stop)
            found, now, more = walk(piece, [x[:, part] for x in tensors], now, first)
            outputs.append(found)
            limited = limited + more
    return ContextOutput(torch.cat(outputs, 1), _pack(now), limited)


def fresh_context(*tensors: Any, segment_size: int, **options: Any) -> ContextState:
    """The state before a document, from the operator's own tensors and options."""
    q, weights = tensors[0], tensors[-1]
    memory = fresh_memory(q, q, q, weights)
    batch, _, heads, dim = q.shape
    start = memory.values[:, :, 1]
    keys = start.new_zeros(batch, heads, 2 * (segment_size - 1) * dim)
    return ContextState(torch.cat([memory.values.flatten(2), start, keys], -1), memory.done)


class _Walk:
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
        self, piece: Segments, tokens: list[Tensor], now: _Open, fresh: _Open
    ) -> tuple[Tensor, _Open, Tensor]:
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
        after = _Open(
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
        now: _Open,
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


def _begin(piece: Segments, now: _Open, fresh: _Open) -> _Open:
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
    return _Open(memory, start, keys, values, torch.where(piece.renews, 0, count))


def _project(x: Tensor, w: Tensor) -> Tensor:
    """`W x` of every head: `(B, n, H, D)` by `(H, D, D)`, in the dtype of x."""
    return torch.einsum("bthd,hed->bthe", x, w.to(x.dtype))


def _pack(now: _Open) -> ContextState:
    keys, values = (x.transpose(1, 2).flatten(2) for x in (now.keys, now.values))
    flat = torch.cat([now.memory.values.flatten(2), now.start, keys, values], -1)
    return ContextState(flat, now.count)


def _unpack(
    state: ContextState, q: Tensor, weights: Weights, segment_size: int, chunk_size: int
) -> _Open:
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
    return _Open(MemoryState(memory.unflatten(2, (3, -1)), done), start, keys, values, count)


def _check(
    q: Tensor,
    o: Tensor,
    lse: Tensor,
    r: Tensor,
    recalled: Weights,
    learned: Weights,
    segment_size: int,
    chunk_size: int,
) -> None:
    if q.dim() != 4 or q.shape[1] == 0:
        raise ValueError(f"q has shape {tuple(q.shape)}, expected (B, T, H, D) with T > 0")
    for name, x, shape in (("o", o, q.shape), ("r", r, q.shape), ("lse", lse, q.shape[:3])):
        if x.shape != shape:
            raise ValueError(f"{name} has shape {tuple(x.shape)}, expected {tuple(shape)}")
    heads, dim = q.shape[2:]
    for name, count, found in (("recalled", 2, recalled), ("learned", 3, learned)):
        if [tuple(w.shape) for w in found] != [(heads, dim, dim)] * count:
            raise ValueError(
                f"{name} has shapes {[tuple(w.shape) for w in found]}, expected {count} of "
                f"(H, D, D) = {(heads, dim, dim)}"
            )
    if segment_size < 1 or chunk_size < 1 or segment_size % chunk_size:
        raise ValueError(
            f"segment_size is {segment_size}, expected a multiple of chunk_size {chunk_size}"
        )
