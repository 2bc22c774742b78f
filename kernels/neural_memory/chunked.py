"""Neural memory in chunks: no weights between a chunk's ends are ever made.

With β_t, H_t the products of 1 - α and η from the chunk's start to t, and for i ≤ t

    A[t, i] = Σ_{j=i..t} (β_t / β_j) (H_j / H_i),      P_t = Σ_{j≤t} (β_t / β_j) H_j,

the weights after t are `β_t M + P_t S - Σ_{i≤t} A[t, i] θ_i δ_i a_iᵀ`, and a layer of the memory
reads x_t as `β_t M x_t + P_t S x_t - Σ_{i≤t} A[t, i] θ_i (a_i · x_t) δ_i`. Ratios are exponentials
of sums between two places, not quotients, so that gates of zero do no harm. What depends on gates
alone is made here, for all chunks at once; `loop` goes through the chunks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rondo.kernels.neural_memory.chunk import TORCH, Passes
from rondo.kernels.neural_memory.layers import Limits, Matrices
from rondo.kernels.neural_memory.layout import grid
from rondo.kernels.neural_memory.loop import Loop
from rondo.kernels.neural_memory.plan import Plan


@torch.compiler.disable  # it would unroll the chunks: one graph break
def neural_memory(
    tokens: list[Tensor],
    initial: Matrices,
    memory: list[Matrices],
    done: Tensor | None,
    segment_ids: Tensor | None,
    limits: Limits,
    residual: bool,
    chunk_size: int,
    at_border: bool,
    passes: Passes = TORCH,
) -> tuple[Tensor, list[Matrices], Tensor, Tensor]:
    """The chunked form; arguments as for `reference.neural_memory`."""
    batch, time, heads = tokens[3].shape
    places = grid(tokens[0], done, segment_ids, chunk_size, at_border)
    # A slot without a token keeps the weights and the momentum, and adds none to the other.
    real = torch.ones_like(tokens[3])
    sequences = (places.lay(x) for x in (*tokens, real))
    # (n, B H, C, ...)
    laid = [x.transpose(2, 3).movedim(1, 0).flatten(1, 2) for x in sequences]
    q, k, v, rate, *gating = (x.contiguous() for x in laid)
    target = 2 * (k - v) if residual else -2 * v
    start, anchor, weights, momentum = (
        [m.mT.flatten(0, 1) for m in each] for each in (initial, *memory)
    )
    states = [torch.cat(each, 1) for each in zip(weights, momentum, strict=True)]
    begins, full = (x.T.repeat_interleave(heads, 1) for x in (places.begins, places.full))
    plan = Plan(begins, full, places.mixed, limits, len(initial), passes)
    o, limited, *after = Loop.apply(
        plan, q, k, target, rate, *_gates(*gating), *start, *anchor, *states
    )
    o = (o + q if residual else o).unflatten(1, (batch, heads))
    anchor, states = after[: plan.layers], after[plan.layers :]
    pairs = [s.chunk(2, 1) for s in states]
    memory = [
        [m.unflatten(0, (batch, heads)).mT for m in each]
        for each in (anchor, *zip(*pairs, strict=True))
    ]
    limited = limited.unflatten(0, (batch, heads))
    return places.pick(o.movedim(0, 1).transpose(2, 3), time), memory, places.done, limited


def _gates(
    log_momentum: Tensor, log_decay: Tensor, real: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of every chunk: A `(..., C, C)`; β and P `(..., C, 2)`; the last row of A and what is left
    of a token's part in the momentum at the end, H_end / H_i, `(..., C, 2)`; and β, H and P at the
    end `(..., 3)`."""
    between, after = (_sums(x).exp() for x in (log_decay, log_momentum))
    between = between * real[..., None, :]
    decay, grown = log_decay.cumsum(-1).exp(), log_momentum.cumsum(-1).exp()
    reach = (between @ grown[..., None])[..., 0]
    spread = between @ after
    at_end = torch.stack([spread[..., -1, :], after[..., -1, :]], -1)
    carried = torch.stack([x[..., -1] for x in (decay, grown, reach)], -1)
    return spread, torch.stack([decay, reach], -1), at_end, carried


def _sums(x: Tensor) -> Tensor:
    """`(..., C, C)`: the sum of `x` `(..., C)` from after i to t at [t, i], -inf for i > t."""
    size = x.shape[-1]
    lower = torch.ones(size, size, dtype=torch.bool, device=x.device).tril()
    strict = lower.tril(-1)
    sums = x[..., :, None].expand(*x.shape, size).masked_fill(~strict, 0.0).cumsum(-2)
    return sums.masked_fill(~lower, -torch.inf)
