"""Cases of operators that are nonlinear in their state: cells by Newton's method, and networks that
learn while they read. Inputs and results as in `cases.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rondo.kernels import FastWeights, fast_weights, neural_memory, newton_rnn
from rondo.kernels.bench.presets import Preset, draw, matrices, unit

FAST_HEADS, FAST_CHUNK = 4, 2048
"""Of fast weights, as `lact` has them: heads share the width, hidden layers are as wide as they."""
MEMORY_DIM, MEMORY_EXPANSION = 128, 2
"""Of neural memories of two layers, as in `models/presets/titans-hybrid-{1.3b,7b}.yaml`."""


def newton(cell: str, rows: int) -> Callable[..., Any]:
    """A cell of channels by themselves, with `rows` recurrent weights each."""

    def make(p: Preset, batch: int, time: int, device: torch.device) -> Any:
        recurrent = torch.randn(rows, p.dim, device=device) / p.dim**0.5
        inputs = {
            "gates": draw(batch, time, 3, p.dim, device=device),
            "recurrent": recurrent.requires_grad_(),
        }
        flops = 2.0 * (rows + 3) * batch * time * p.dim
        extra = {"cell": cell}
        return (lambda **given: newton_rnn(cell, **given).h), inputs, flops, 2 * flops, extra

    return make


def fast_case(p: Preset, batch: int, time: int, device: torch.device) -> Any:
    """Fast weights trained by orthogonalised steps with momentum."""
    width, shape = p.dim // FAST_HEADS, (batch, time, FAST_HEADS)
    chunk = min(FAST_CHUNK, time // 2)  # so that tokens read what others have taught
    inputs = {name: unit(*shape, width, device=device) for name in ("q", "k")}
    inputs["v"] = draw(*shape, width, device=device)
    inputs["rates"] = (torch.rand(*shape, 3, device=device) / 500).requires_grad_()
    inputs["momentum"] = torch.rand(shape, device=device).requires_grad_()
    for name in ("gate", "up", "down"):
        inputs[name] = matrices(FAST_HEADS, width, width, device)
    step = 3 * 30.0 * width**3  # Newton-Schulz of three square matrices
    flops = batch * FAST_HEADS * (18.0 * time * width**2 + time // chunk * step)
    extra = {"chunk_size": chunk}
    return (lambda **given: fast(**given, **extra)), inputs, flops, 2 * flops, extra


def fast(
    gate: Tensor, up: Tensor, down: Tensor, rates: Tensor, chunk_size: int, **inputs: Any
) -> Tensor:
    """`fast_weights` of the inputs of its case."""
    weights = FastWeights(gate, up, down)
    return fast_weights(learning_rates=rates, weights=weights, chunk_size=chunk_size, **inputs)[0]


def memory_case(p: Preset, batch: int, time: int, device: torch.device) -> Any:
    """A neural memory with gates about as a new layer makes them."""
    dim = min(MEMORY_DIM, p.dim)
    hidden, shape = MEMORY_EXPANSION * dim, (batch, time, p.dim // dim)
    inputs = {name: unit(*shape, dim, device=device) for name in ("q", "k")}
    inputs["v"] = draw(*shape, dim, device=device)
    inputs["learning_rate"] = (torch.rand(shape, device=device) / 100).requires_grad_()
    for name, start in (("log_momentum", 0.85), ("log_decay", 4.0)):
        gate = torch.randn(shape, device=device) + start
        inputs[name] = F.logsigmoid(gate).requires_grad_()
    inputs["first"] = matrices(shape[2], hidden, dim, device)
    inputs["second"] = matrices(shape[2], dim, hidden, device)
    # Of each matrix what it makes of k and of q, and its gradient; errors go back through one.
    flops = float(batch * time * shape[2] * (6 + 8) * dim * hidden)
    return memory, inputs, flops, 2 * flops


def memory(first: Tensor, second: Tensor, **inputs: Any) -> Tensor:
    """`neural_memory` of the inputs of its case."""
    return neural_memory(weights=(first, second), **inputs).o
