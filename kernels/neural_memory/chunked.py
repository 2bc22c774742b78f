"""Neural memory in chunks: no weights between a chunk's ends are ever made.

With β_t, H_t the products of 1 - α and η from the chunk's start to t, and for i ≤ t

    A[t, i] = Σ_{j=i..t} (β_t / β_j) (H_j / H_i),      P_t = Σ_{j≤t} (β_t / β_j) H_j,

the weights after t are `β_t M + P_t S - Σ_{i≤t} A[t, i] θ_i δ_i a_iᵀ`, and a layer of the memory
reads x_t as `β_t M x_t + P_t S x_t - Σ_{i≤t} A[t, i] θ_i (a_i · x_t) δ_i`. Ratios are exponentials
of sums between two places, not quotients, so that gates of zero do no harm.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rondo.kernels.neural_memory.layers import Limits, Matrices, bounded, gradients, limited_rates
from rondo.kernels.neural_memory.layout import grid


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
    laid = [
        places.lay(x).transpose(2, 3).movedim(1, 0) for x in (*tokens, real)
    ]  # (n, B, H, C, ..)
    flags = (places.begins.T, places.full.T)
    limited = torch.zeros(laid[3].shape[1:3], dtype=torch.int64, device=laid[3].device)
    group = math.isqrt(places.chunks - 1) + 1
    outputs, layers = [], len(initial)
    for first in range(0, places.chunks, group):
        part = slice(first, first + group)
        walk = _Walk([flag[part] for flag in flags], limits, residual, layers)
        inputs = [*(x[part] for x in laid), *initial, *(m for each in memory for m in each)]
        # Only the states between groups are kept; a group's inside is made again.
        result = checkpoint(walk, *inputs, use_reentrant=False, preserve_rng_state=False)
        o, count, *flat = result
        outputs.append(o)
        limited = limited + count
        memory = [flat[i * layers : (i + 1) * layers] for i in range(3)]
    o = torch.cat(outputs).movedim(0, 1).transpose(2, 3)
    return places.pick(o, time), memory, places.done, limited


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

    def __init__(self, flags: list[Tensor], limits: Limits, residual: bool, layers: int) -> None:
        self.begins, self.full = flags
        self.limits, self.residual, self.layers = limits, residual, layers

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        q, k, v, rate, *gating = tensors[:7]
        initial, *memory = (
            list(tensors[7 + i * self.layers : 7 + (i + 1) * self.layers]) for i in range(4)
        )
        gates = _gates(*gating)
        outputs, limited = [], torch.zeros(q.shape[1:3], dtype=torch.int64, device=q.device)
        for i in range(len(q)):
            memory, count = self._begin(i, initial, memory)
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
