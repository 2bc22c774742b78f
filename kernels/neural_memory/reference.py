"""Neural memory, one token at a time."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rondo.kernels.neural_memory.layers import (
    HandOn,
    Limits,
    Matrices,
    bounded,
    gradients,
    limited_rates,
)
from rondo.kernels.segments import document_starts


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
) -> tuple[Tensor, list[Matrices], Tensor, Tensor]:
    """Checked and defaulted arguments: `tokens` are q, k, v, learning rate, log momentum and log
    decay; `memory` the weights at the chunk's start, the weights and the momentum; `done` None for
    a memory that has seen nothing."""
    anchor, weights, momentum = memory
    v = tokens[2]
    starts = None if segment_ids is None else document_starts(segment_ids)
    if done is None:
        done = torch.zeros(len(v), dtype=torch.int64, device=v.device)
    limited = torch.zeros(v.shape[0], v.shape[2], dtype=torch.int64, device=v.device)
    outputs = []
    for t in range(v.shape[1]):
        if starts is not None:
            new = starts[:, t]
            zero = [torch.zeros_like(s) for s in momentum]
            anchor, weights = _where(new, initial, anchor), _where(new, initial, weights)
            momentum, done = _where(new, zero, momentum), done.masked_fill(new, 0)
        full = done == chunk_size
        weights, momentum = (
            [HandOn.apply(x, full[:, None], limits.gradient) for x in each]
            for each in (weights, momentum)
        )
        (w, many), (s, more) = (bounded(each, limits.weight) for each in (weights, momentum))
        limited = limited + torch.where(full[:, None], many + more, 0)
        weights, momentum = _where(full, w, weights), _where(full, s, momentum)
        anchor, done = _where(full, weights, anchor), done.masked_fill(full, 0) + 1
        q, k, v_t, rate, log_momentum, log_decay = (x[:, t, :, None] for x in tokens)
        inputs, errors = gradients(anchor, k, v_t, residual)
        rates, count = limited_rates(rate, inputs, errors, limits.update)
        limited = limited + count
        momentum = [
            log_momentum.exp()[..., None] * s - r[..., None] * e.mT @ a
            for s, r, e, a in zip(momentum, rates, errors, inputs, strict=True)
        ]
        decay = log_decay.exp()[..., None]
        weights = [decay * w + s for w, s in zip(weights, momentum, strict=True)]
        outputs.append(_read(weights, q, residual))
    return torch.cat(outputs, 2).transpose(1, 2), [anchor, weights, momentum], done, limited


def _read(weights: Matrices, q: Tensor, residual: bool) -> Tensor:
    x = q
    for i, w in enumerate(weights):
        x = (F.silu(x) if i else x) @ w.mT
    return x + q if residual else x


def _where(rows: Tensor, yes: Matrices, no: Matrices) -> Matrices:
    condition = rows[:, None, None, None]
    return [torch.where(condition, a, b) for a, b in zip(yes, no, strict=True)]
