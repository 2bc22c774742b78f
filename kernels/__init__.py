"""Operators: pure functions on tensors, each with a readable reference and fast forms.

Sequence tensors are `(batch, time, heads, dim)`; see README.md in this folder.
"""

from rondo.kernels.conv import short_conv
from rondo.kernels.cross_entropy import linear_cross_entropy
from rondo.kernels.delta_rule import gated_delta_rule, gated_delta_rule_summary
from rondo.kernels.expert_rows import combine_rows, gather_rows
from rondo.kernels.fast_weights import FastWeights, FastWeightState, fast_weights
from rondo.kernels.linear_attention import gated_linear_attention, gated_linear_attention_summary
from rondo.kernels.memory_context import memory_context
from rondo.kernels.mlstm import mlstm, mlstm_summary
from rondo.kernels.neural_memory import neural_memory
from rondo.kernels.newton_rnn import newton_rnn
from rondo.kernels.nonlinear_rnn import nonlinear_rnn
from rondo.kernels.norms import gated_rms_norm, l2_norm, rms_norm
from rondo.kernels.pointwise import soft_cap, swiglu
from rondo.kernels.rope import rope
from rondo.kernels.scan import linear_scan, linear_scan_summary
from rondo.kernels.softmax_attention import attend_prefix, attention
from rondo.kernels.summary import DiagonalSummary, LogSummary, MatrixSummary, combine

__all__ = [
    "DiagonalSummary",
    "FastWeightState",
    "FastWeights",
    "LogSummary",
    "MatrixSummary",
    "attend_prefix",
    "attention",
    "combine",
    "combine_rows",
    "fast_weights",
    "gated_delta_rule",
    "gated_delta_rule_summary",
    "gated_linear_attention",
    "gated_linear_attention_summary",
    "gated_rms_norm",
    "gather_rows",
    "l2_norm",
    "linear_cross_entropy",
    "linear_scan",
    "linear_scan_summary",
    "memory_context",
    "mlstm",
    "mlstm_summary",
    "neural_memory",
    "newton_rnn",
    "nonlinear_rnn",
    "rms_norm",
    "rope",
    "short_conv",
    "soft_cap",
    "swiglu",
]
