"""Each recurrence with what other ranks must know of it: a linear one's summary (what a stretch
of tokens does to any state), a nonlinear one's state before a document, or that its steps are sums
over tokens, that iterations solve it, or that its heads can run apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from rondo.kernels.delta_rule import (
    gated_delta_rule,
    gated_delta_rule_stretch,
    gated_delta_rule_summary,
)
from rondo.kernels.fast_weights import fast_weights
from rondo.kernels.linear_attention import (
    gated_linear_attention,
    gated_linear_attention_stretch,
    gated_linear_attention_summary,
)
from rondo.kernels.memory_context import fresh_context, memory_context
from rondo.kernels.mlstm import mlstm, mlstm_stretch, mlstm_summary
from rondo.kernels.neural_memory import fresh_memory, neural_memory
from rondo.kernels.newton_rnn import newton_rnn
from rondo.kernels.nonlinear_rnn import nonlinear_rnn
from rondo.kernels.scan import linear_scan, linear_scan_stretch, linear_scan_summary
from rondo.kernels.summary import DiagonalSummary, LogSummary, MatrixSummary, Stretch

Summarize = Callable[..., DiagonalSummary | MatrixSummary | LogSummary]


def _without_queries(summarize: Summarize) -> Summarize:
    """Queries read the state and leave it as it is."""

    def of_operands(q: Tensor, *others: Tensor | None, **options: Any) -> Any:
        return summarize(*others, **options)

    return of_operands


SUMMARIES: dict[Callable[..., tuple[Tensor, Tensor]], Summarize] = {
    linear_scan: linear_scan_summary,
    gated_linear_attention: _without_queries(gated_linear_attention_summary),
    gated_delta_rule: _without_queries(gated_delta_rule_summary),
    mlstm: _without_queries(mlstm_summary),
}
"""Operator -> function of the operator's own tensors and `segment_ids` that gives its summary."""

STRETCHES: dict[Callable[..., tuple[Tensor, Tensor]], Callable[..., Stretch | None]] = {
    linear_scan: linear_scan_stretch,
    gated_linear_attention: gated_linear_attention_stretch,
    gated_delta_rule: gated_delta_rule_stretch,
    mlstm: mlstm_stretch,
}
"""Operator of `SUMMARIES` -> function of its arguments, without the initial state, that begins it
before that state is known; None where summary and outputs are best made apart."""

CHAINS: dict[Callable[..., Any], Callable[..., Any]] = {
    neural_memory: fresh_memory,
    memory_context: fresh_context,
}
"""Nonlinear operator -> function of the operator's own tensors and options that gives its state
before a document: a tuple of numbers `(B, H, ...)` and integers `(B,)`."""

SUMS: frozenset[Callable[..., Any]] = frozenset({fast_weights})
"""Nonlinear operators whose steps are sums over the tokens of a chunk: with their argument `share`
ranks each add up a part of every chunk."""

SOLVED: frozenset[Callable[..., Any]] = frozenset({newton_rnn})
"""Nonlinear operators that iterate on all of a row at once: with their argument `neighbours` each
rank does so on its stretch."""

HEADS: frozenset[Callable[..., Any]] = frozenset({nonlinear_rnn})
"""Operators that must run through a row from end to end, but on any of the heads alone: they take
(cell, gates `(B, T, G, H, D)`, recurrent `(G, H, D, D)`)."""
