"""A small call of every operator that takes a backend."""

from __future__ import annotations

from typing import Any

import torch

from rondo.kernels import FastWeights

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
"""Name -> tensors."""
OPTIONS = {"memory_context": {"segment_size": 4, "chunk_size": 2}}
