"""Recurrences, one position at a time, and the cells as they are written in the paper."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rondo.kernels.newton_rnn.cells import Cell, ParaGRU, ParaLSTM
from rondo.kernels.newton_rnn.functions import FunctionCell
from rondo.kernels.newton_rnn.neighbours import Neighbours
from rondo.kernels.newton_rnn.newton import Health, Policy, no_iterations
from rondo.kernels.segments import document_starts


def para_gru(h: Tensor, gates: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """The next h of a ParaGRU."""
    (g_z, g_r, g_n), (a_z, a_r, a_n) = gates, weights
    z = torch.sigmoid(g_z + a_z * h)
    r = torch.sigmoid(g_r + a_r * h)
    n = torch.tanh(g_n + a_n * (h * r))
    return (1 - z) * h + z * n


def para_lstm(
    state: tuple[Tensor, ...], gates: Sequence[Tensor], weights: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """The next (c, h) of a ParaLSTM."""
    (c, h), (g_f, g_o, g_z), (a_f, a_o, a_z, c_f, c_o) = state, gates, weights
    f = torch.sigmoid(g_f + a_f * h + c_f * c)
    z = torch.tanh(g_z + a_z * h)
    c = f * c + (1 - f) * z
    o = torch.sigmoid(g_o + a_o * h + c_o * c)
    return c, o * torch.tanh(c)


_FUNCTIONS: dict[type, Callable[..., Any]] = {ParaGRU: para_gru, ParaLSTM: para_lstm}


def newton_rnn(
    cell: Cell,
    gates: Tensor,
    weights: Tensor,
    bias: Tensor | None,
    first: Tensor,
    segment_ids: Tensor | None,
    policy: Policy,
    neighbours: Neighbours | None,
) -> tuple[Tensor, Tensor, Health]:
    """Arguments and results as for `chunked.newton_rnn`; there is nothing to be judged."""
    if neighbours is not None:
        raise ValueError("newton_rnn: backend 'reference' knows no neighbours; take 'chunked'")
    function = cell.function if isinstance(cell, FunctionCell) else _FUNCTIONS[type(cell)]
    gates = gates.to(weights.dtype)
    if bias is not None:
        gates = gates + bias
    starts = None if segment_ids is None else document_starts(segment_ids)
    state, outputs = first, []
    for t, here in enumerate(gates.unbind(1)):
        if starts is not None:
            state = torch.where(starts[:, t, None, None], 0.0, state)
        before = state.unbind(1) if cell.variables > 1 else state[:, 0]
        after = function(before, here.unbind(1), weights.unbind(0))
        state = torch.stack(after, 1) if cell.variables > 1 else after.unsqueeze(1)
        outputs.append(state[:, -1])
    return torch.stack(outputs, 1), state, no_iterations(weights)
