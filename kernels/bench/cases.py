"""What is timed: operators at the shapes of presets, and what they have to move and compute."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rondo.kernels import (
    attention,
    gated_delta_rule,
    gated_linear_attention,
    gated_rms_norm,
    linear_cross_entropy,
    linear_scan,
    nonlinear_rnn,
    rms_norm,
    short_conv,
)
from rondo.kernels.bench import mixtures
from rondo.kernels.bench.learners import fast_case, memory_case, newton
from rondo.kernels.bench.presets import PRESETS, Preset, draw, unit

CELL_DIM = 128
"""Channels of a head whose gates see all of it: the most that a kernel holds."""
CHUNK = 64
"""Tokens in a chunk: what a chunked form computes depends on it."""


@dataclass
class Case:
    """An operator at one shape."""

    operator: str
    preset: str
    batch: int
    time: int
    run: Callable[..., Tensor]
    """Called with the inputs, by name."""
    inputs: dict[str, Tensor]
    flops: float
    """Of products, forward; 0 for what memory alone limits."""
    backward_flops: float = 0.0
    extra: dict[str, Any] = field(default_factory=dict)
    """What a peer is given besides the inputs; `run` has it."""

    def bytes(self, output: Tensor, backward: bool) -> int:
        """What cannot be avoided: inputs read and outputs written once; in the backward pass
        inputs and the gradient of the outputs read, and gradients of the inputs written."""
        inputs = sum(x.nbytes for x in self.inputs.values())
        forward = inputs + output.nbytes
        return forward + inputs + forward if backward else forward


def _norm(p: Preset, batch: int, time: int, device: torch.device) -> Any:
    inputs = {"x": draw(batch, time, p.dim, device=device), "weight": draw(p.dim, device=device)}
    return rms_norm, inputs, 0.0, 0.0


def _gated_norm(p: Preset, batch: int, time: int, device: torch.device) -> Any:
    shape = (batch, time, p.heads, p.value_dim)
    inputs = {name: draw(*shape, device=device) for name in ("x", "gate")}
    return gated_rms_norm, inputs | {"weight": draw(p.value_dim, device=device)}, 0.0, 0.0


def _scan(p: Preset, batch: int, time: int, device: torch.device) -> Any:
    gate = -torch.rand(batch, time, p.dim, device=device) / 8  # a logarithm, as the peers take it
    inputs = {"g": gate.requires_grad_(), "x": draw(batch, time, p.dim, device=device)}
    return (lambda g, x: linear_scan(g.exp(), x)[0]), inputs, 0.0, 0.0


def _conv(p: Preset, batch: int, time: int, device: torch.device) -> Any:
    inputs = {
        "x": draw(batch, time, p.dim, device=device),
        "weight": draw(p.dim, 4, device=device),
    }
    return (lambda x, weight: short_conv(x, weight, activation="silu")[0]), inputs, 0.0, 0.0


def _loss(p: Preset, batch: int, time: int, device: torch.device) -> Any:
    targets = torch.randint(p.vocabulary, (batch * time,), device=device)
    inputs = {
        "hidden": draw(batch * time, p.dim, device=device),
        "weight": (torch.randn(p.vocabulary, p.dim, device=device) / p.dim**0.5)
        .bfloat16()
        .requires_grad_(),
    }
    flops = 2.0 * batch * time * p.dim * p.vocabulary

    def run(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, weight, targets, reduction="mean")

    return run, inputs, flops, 2 * flops, {"targets": targets}


def _linear(decay: str, delta: bool) -> Callable[..., Any]:
    """Linear attention or the delta rule, with a decay of one kind."""

    def make(p: Preset, batch: int, time: int, device: torch.device) -> Any:
        shape = (batch, time, p.heads)
        inputs = {name: draw(*shape, p.key_dim, device=device) for name in ("q", "k")}
        if delta:  # keys of length 1, as everyone's must be
            inputs["k"] = unit(*shape, p.key_dim, device=device)
        inputs["v"] = draw(*shape, p.value_dim, device=device)
        if delta:
            inputs["beta"] = torch.rand(shape, device=device).bfloat16().requires_grad_()
        if decay:
            gates = shape if decay == "head" else (*shape, p.key_dim)
            inputs["g"] = F.logsigmoid(torch.randn(gates, device=device) + 3).requires_grad_()

        def run(q: Tensor, k: Tensor, v: Tensor, beta: Any = None, g: Any = None) -> Tensor:
            if delta:
                return gated_delta_rule(q, k, v, beta, g)[0]
            return gated_linear_attention(q, k, v, g)[0]

        keys, values = (3 * p.key_dim, 2 * p.value_dim) if delta else (p.key_dim, p.value_dim)
        each = 2 * CHUNK * (keys + values) + (6 if delta else 4) * p.key_dim * p.value_dim
        each += 2 / 3 * CHUNK**2 if delta else 0
        flops = float(each * batch * time * p.heads)
        return run, inputs, flops, 2 * flops

    return make


def _attention(p: Preset, batch: int, time: int, device: torch.device) -> Any:
    shape = (batch, time, p.attention_heads, p.attention_dim)
    inputs = {name: draw(*shape, device=device) for name in ("q", "k", "v")}
    flops = 2.0 * batch * time * time * p.attention_heads * p.attention_dim  # half is masked
    return (lambda q, k, v: attention(q, k, v)), inputs, flops, 2.5 * flops


def _cells(cell: str, one_head: bool) -> Callable[..., Any]:
    """A nonlinear recurrence of one head, as torch has it, or of the model's width."""

    def make(p: Preset, batch: int, time: int, device: torch.device) -> Any:
        dim = min(CELL_DIM, p.dim)
        heads = 1 if one_head else p.dim // dim
        recurrent = torch.randn(4, heads, dim, dim, device=device) / dim
        inputs = {
            "gates": draw(batch, time, 4, heads, dim, device=device),
            "recurrent": recurrent.bfloat16().requires_grad_(),
        }
        flops = 8.0 * batch * time * heads * dim**2
        return (
            (lambda gates, recurrent: nonlinear_rnn(cell, gates, recurrent)[0]),
            inputs,
            flops,
            2 * flops,
        )

    return make


OPERATORS: dict[str, Callable[..., Any]] = {
    "rms_norm": _norm,
    "gated_rms_norm": _gated_norm,
    "linear_scan": _scan,
    "short_conv": _conv,
    "linear_cross_entropy": _loss,
    "linear_attention": _linear("", False),
    "linear_attention_head_decay": _linear("head", False),
    "linear_attention_key_decay": _linear("key", False),
    "delta_rule": _linear("", True),
    "delta_rule_head_decay": _linear("head", True),
    "delta_rule_key_decay": _linear("key", True),
    "attention": _attention,
    "gather_rows": mixtures.gather_case,
    "combine_rows": mixtures.combine_case,
    "expert_products": mixtures.product_case,
    "lstm": _cells("lstm", True),
    "slstm": _cells("slstm", False),
    "para_gru": newton("para_gru", 3),
    "para_lstm": newton("para_lstm", 5),
    "fast_weights": fast_case,
    "neural_memory": memory_case,
}
LONGEST = {"lstm": 8192, "slstm": 8192, "neural_memory": 2048}
"""Positions up to which operators are timed that take them, or short chunks, in turn."""


def make_case(operator: str, preset: str, batch: int, time: int, device: torch.device) -> Case:
    """Random inputs on `device` and all that is known of the case."""
    torch.manual_seed(0)
    run, inputs, flops, backward, *extra = OPERATORS[operator](PRESETS[preset], batch, time, device)
    return Case(operator, preset, batch, time, run, inputs, flops, backward, *extra)
