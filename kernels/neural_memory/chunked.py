"""Neural memory in chunks: no weights between a chunk's ends are ever made.

With β_t, H_t the products of 1 - α and η from the chunk's start to t, and for i ≤ t

    A[t, i] = Σ_{j=i..t} (β_t / β_j) (H_j / H_i),      P_t = Σ_{j≤t} (β_t / β_j) H_j,

the weights after t are `β_t M + P_t S - Σ_{i≤t} A[t, i] θ_i δ_i a_iᵀ`, and a layer of the memory
reads x_t as `β_t M x_t + P_t S x_t - Σ_{i≤t} A[t, i] θ_i (a_i · x_t) δ_i`. Ratios are exponentials
of sums between two places, not quotients, so that gates of zero do no harm.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from rondo.kernels.neural_memory.layers import Limits, Matrices, bounded, gradients, limited_rates
from rondo.kernels.neural_memory.layout import grid

_SEQUENCES, _REAL = 7, 6
"""How many sequences a chunk has, and which of them says where tokens are."""


def neural_memory(
    tokens: list[Tensor],
    initial: Matrices,
    memory: list[Matrices],
    done: Tensor | None,
    segment_ids: Tensor | None,
    limits: Limits,
    residual: bool,
    chunk_size: int,
) -> tuple[Tensor, list[Matrices], Tensor, Tensor]:
    """The chunked form; arguments as for `reference.neural_memory`."""
    time = tokens[0].shape[1]
    places = grid(tokens[0], done, segment_ids, chunk_size)
    # A slot without a token keeps the weights and the momentum, and adds none to the other.
    real = torch.ones_like(tokens[3])
    sequences = (places.lay(x) for x in (*tokens, real))
    laid = [x.transpose(2, 3).movedim(1, 0) for x in sequences]  # (n, B, H, C, ...)
    layers = len(initial)
    walk = _Walk((places.begins.T, places.full.T), limits, residual, layers)
    o, limited, *flat = _Loop.apply(walk, *laid, *initial, *(m for each in memory for m in each))
    o = o.movedim(0, 1).transpose(2, 3)
    memory = [flat[i * layers : (i + 1) * layers] for i in range(3)]
    return places.pick(o, time), memory, places.done, limited


class _Loop(torch.autograd.Function):
    """All chunks. Of n, the memory is kept before every √n-th; what lies between is made again in
    the backward pass, where autograd goes through it."""

    @staticmethod
    def forward(ctx: Any, walk: _Walk, *tensors: Tensor) -> tuple[Tensor, ...]:
        sequences, rest = tensors[:_SEQUENCES], list(tensors[_SEQUENCES:])
        chunks = len(sequences[0])
        group = math.isqrt(chunks - 1) + 1
        ctx.walk, ctx.parts, ctx.layers = walk, [], walk.layers
        outputs, counts, states = [], [], []
        for first in range(0, chunks, group):
            part = slice(first, first + group)
            ctx.parts.append(part)
            states += rest[walk.layers :]
            o, count, *memory = walk(part, *(x[part] for x in sequences), *rest)
            rest = [*rest[: walk.layers], *memory]
            outputs.append(o)
            counts.append(count)
        ctx.save_for_backward(*sequences, *rest[: walk.layers], *states)
        limited = torch.stack(counts).sum(0)
        ctx.mark_non_differentiable(limited)
        return torch.cat(outputs), limited, *rest[walk.layers :]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, at_o: Tensor, _: Tensor, *at_memory: Tensor) -> tuple[Any, ...]:
        saved, ends = ctx.saved_tensors, _SEQUENCES + ctx.layers
        sequences, initial, states = saved[:_SEQUENCES], saved[_SEQUENCES:ends], saved[ends:]
        at_initial = [torch.zeros_like(w) for w in initial]
        found: list[tuple[Tensor, ...]] = []
        for i, part in reversed(list(enumerate(ctx.parts))):
            before = states[3 * ctx.layers * i : 3 * ctx.layers * (i + 1)]
            leaves = [x.detach() for x in (*(x[part] for x in sequences), *initial, *before)]
            wanted = [x.requires_grad_() for j, x in enumerate(leaves) if j != _REAL]
            with torch.enable_grad():
                o, _, *memory = ctx.walk(part, *leaves)
            grads = torch.autograd.grad(
                [o, *memory], wanted, [at_o[part], *at_memory], materialize_grads=True
            )
            found.append(grads[:_REAL])
            for total, grad in zip(at_initial, grads[_REAL:], strict=False):
                total += grad
            at_memory = grads[_REAL + ctx.layers :]
        at_sequences = [torch.cat(each[::-1]) for each in zip(*found, strict=True)]
        return None, *at_sequences, None, *at_initial, *at_memory


class _Gates(NamedTuple):
    """Of one chunk, by (B, H)."""

    decay: Tensor
    """β `(..., C)`."""
    reach: Tensor
    """P `(..., C)`: what the momentum before the chunk has added by t."""
    spread: Tensor
    """A `(..., C, C)`."""
    momentum: Tensor
    """H at the chunk's end `(..., 1, 1)`."""
    fade: Tensor
    """`H_end / H_i` `(..., C)`."""


class _Walk:
    """Some chunks, one after another."""

    def __init__(
        self, flags: tuple[Tensor, Tensor], limits: Limits, residual: bool, layers: int
    ) -> None:
        self.begins, self.full = flags
        self.limits, self.residual, self.layers = limits, residual, layers

    def __call__(self, part: slice, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The chunks `part`, of which `tensors` are the sequences, the memory of a new document
        and the memory before. Returns outputs, how often a limit acted, and the memory after."""
        q, k, v, rate, *gating = tensors[:_SEQUENCES]
        initial, *memory = (
            list(tensors[_SEQUENCES + i * self.layers :][: self.layers]) for i in range(4)
        )
        gates = _gates(*gating)
        outputs, limited = [], torch.zeros(q.shape[1:3], dtype=torch.int64, device=q.device)
        for i in range(len(q)):
            memory, count = self._begin(part.start + i, initial, memory)
            inputs, errors = gradients(memory[0], k[i], v[i], self.residual)
            rates, more = limited_rates(rate[i], inputs, errors, self.limits.update)
            limited = limited + count + more
            o, memory = _step(memory, _Gates(*(x[i] for x in gates)), q[i], inputs, errors, rates)
            outputs.append(o + q[i] if self.residual else o)
        return torch.stack(outputs), limited, *(m for each in memory for m in each)

    def _begin(
        self, i: int, initial: Matrices, memory: list[Matrices]
    ) -> tuple[list[Matrices], Tensor]:
        """The memory as chunk i finds it, and how often it was limited."""
        anchor, weights, momentum = memory
        full, begins = (x[i][:, None, None, None] for x in (self.full, self.begins))
        (w, many), (s, more) = (bounded(each, self.limits.weight) for each in (weights, momentum))
        after = []
        for a, now, low, moved, slow, start in zip(
            anchor, weights, w, momentum, s, initial, strict=True
        ):
            now = torch.where(begins, start, torch.where(full, low, now))
            moved = torch.where(begins, 0.0, torch.where(full, slow, moved))
            after.append((torch.where(begins | full, now, a), now, moved))
        count = torch.where(self.full[i][:, None], many + more, 0)
        return [list(each) for each in zip(*after, strict=True)], count


def _gates(log_momentum: Tensor, log_decay: Tensor, real: Tensor) -> _Gates:
    between, after = (_sums(x).exp() for x in (log_decay, log_momentum))
    between = between * real[..., None, :]
    grown = log_momentum.cumsum(-1).exp()
    return _Gates(
        decay=log_decay.cumsum(-1).exp(),
        reach=(between @ grown[..., None])[..., 0],
        spread=between @ after,
        momentum=grown[..., -1:, None],
        fade=after[..., -1, :],
    )


def _sums(x: Tensor) -> Tensor:
    """`(..., C, C)`: the sum of `x` `(..., C)` from after i to t at [t, i], -inf for i > t."""
    size = x.shape[-1]
    lower = torch.ones(size, size, dtype=torch.bool, device=x.device).tril()
    strict = lower.tril(-1)
    sums = x[..., :, None].expand(*x.shape, size).masked_fill(~strict, 0.0).cumsum(-2)
    return sums.masked_fill(~lower, -torch.inf)


def _step(
    memory: list[Matrices],
    gates: _Gates,
    q: Tensor,
    inputs: list[Tensor],
    errors: list[Tensor],
    rates: list[Tensor],
) -> tuple[Tensor, list[Matrices]]:
    """Reads of a chunk, and the memory at its end."""
    anchor, weights, momentum = memory
    x, new_weights, new_momentum = q, [], []
    decay, reach = gates.decay[..., None], gates.reach[..., None]
    for i, (w, s, a, error, rate) in enumerate(
        zip(weights, momentum, inputs, errors, rates, strict=True)
    ):
        x = F.silu(x) if i else x
        scores = (x @ a.mT) * gates.spread * rate[..., None, :]
        x = decay * (x @ w.mT) + reach * (x @ s.mT) - scores @ error
        written, kept = (
            (error * (rate * share)[..., None]).mT @ a
            for share in (gates.spread[..., -1, :], gates.fade)
        )
        new_weights.append(decay[..., -1:, :] * w + reach[..., -1:, :] * s - written)
        new_momentum.append(gates.momentum * s - kept)
    return x, [anchor, new_weights, new_momentum]
