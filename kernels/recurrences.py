"""Each linear recurrence with its summary: what a stretch of tokens does to any state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from rondo.kernels.delta_rule import gated_delta_rule, gated_delta_rule_summary
from rondo.kernels.linear_attention import gated_linear_attention, gated_linear_attention_summary
from rondo.kernels.scan import linear_scan, linear_scan_summary
from rondo.kernels.summary import DiagonalSummary, MatrixSummary

Summarize = Callable[..., DiagonalSummary | MatrixSummary]


def _without_queries(summarize: Summarize) -> Summarize:
    """Queries read the state and leave it as it is."""

    def of_operands(q: Tensor, *others: Tensor | None, **options: Any) -> Any:
        return summarize(*others, **options)

    return of_operands


SUMMARIES: dict[Callable[..., tuple[Tensor, Tensor]], Summarize] = {
    linear_scan: linear_scan_summary,
    gated_linear_attention: _without_queries(gated_linear_attention_summary),
    gated_delta_rule: _without_queries(gated_delta_rule_summary),
}
"""Operator -> function of the operator's own tensors and `segment_ids` that gives its summary."""
