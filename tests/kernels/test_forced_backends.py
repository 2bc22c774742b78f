"""What each operator says of a backend that cannot serve a call: its own name, and why."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch

from rondo import kernels
from rondo.kernels import FastWeights, backend

pytestmark = pytest.mark.quick
ROW, GATE = torch.randn(1, 8, 2, 4), -torch.rand(1, 8, 2)
SQUARES = torch.randn(2, 4, 4)
MEMORY = (torch.randn(2, 8, 4), torch.randn(2, 4, 8))
FAST = FastWeights(MEMORY[0], MEMORY[0], MEMORY[1])
RATES, CHOICES = torch.rand(1, 8, 2, 3), torch.arange(4)
CELL, WEIGHTS = torch.randn(1, 8, 3, 4), torch.randn(3, 4) / 4
LSTM, DENSE = torch.randn(1, 8, 4, 1, 4), torch.randn(4, 1, 4, 4)
GATES = (GATE.exp(), GATE, GATE)
CALLS: dict[str, tuple[Any, ...]] = {
    "attention": (ROW, ROW, ROW),
    "combine_rows": (torch.randn(4, 4), CHOICES, CHOICES.view(2, 2)),
    "fast_weights": (ROW, ROW, ROW, RATES, FAST),
    "gated_delta_rule": (ROW, ROW, ROW, GATE.exp(), GATE),
    "gated_delta_rule_summary": (ROW, ROW, GATE.exp(), GATE),
    "gated_linear_attention": (ROW, ROW, ROW, GATE),
    "gated_linear_attention_summary": (ROW, ROW, GATE),
    "gated_rms_norm": (ROW, ROW),
    "gather_rows": (torch.randn(2, 4), CHOICES, CHOICES.view(2, 2)),
    "l2_norm": (ROW,),
    "linear_cross_entropy": (torch.randn(4, 4), torch.randn(5, 4), CHOICES),
    "linear_scan": (GATE.exp(), GATE),
    "linear_scan_summary": (GATE.exp(), GATE),
    "memory_context": (ROW, ROW, GATE, ROW, *GATES, (SQUARES,) * 2, (SQUARES,) * 3, MEMORY),
    "mlstm": (ROW, ROW, ROW, GATE, GATE),
    "neural_memory": (ROW, ROW, ROW, *GATES, MEMORY),
    "newton_rnn": ("para_gru", CELL, WEIGHTS),
    "nonlinear_rnn": ("lstm", LSTM, DENSE),
    "rms_norm": (ROW,),
    "short_conv": (torch.randn(1, 8, 4), torch.randn(4, 4)),
}
WITHOUT_KERNELS = {
    "attention": "it has no Triton kernel: 'chunked' takes torch's",
    "memory_context": "no Triton kernel is written for attention to what a memory recalls",
    "mlstm": "no Triton kernel is written for its state",
}


def forced(name: str, backend: str) -> str:
    """The error of an operator on a CPU."""
    options = {"segment_size": 4, "chunk_size": 2} if name == "memory_context" else {}
    operator: Callable[..., Any] = getattr(kernels, name)
    with pytest.raises(ValueError) as error:
        operator(*CALLS[name], **options, backend=backend)
    return str(error.value)


def test_every_operator_with_a_backend_is_here() -> None:
    public = {name: getattr(kernels, name) for name in kernels.__all__}
    taking = {n for n, f in public.items() if "backend" in inspect.signature(f).parameters}
    assert taking == set(CALLS)


@pytest.mark.parametrize("name", CALLS)
def test_triton_on_a_cpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(backend, "_interprets", lambda: False)
    expected = "needs CUDA tensors, got cpu; on a CPU it runs in its interpreter only"
    if name in WITHOUT_KERNELS:
        expected = f"cannot run: {WITHOUT_KERNELS[name]}"
    assert forced(name, "triton").startswith(f"{name}: backend 'triton' {expected}")


@pytest.mark.parametrize("name", CALLS)
def test_a_backend_that_nobody_has(name: str) -> None:
    message = forced(name, "chunks")
    assert message.startswith(f"{name}: backend 'chunks' is not available; choose one of auto, ")
    assert ("chunked" in message and "reference" in message) or name.endswith("summary")
