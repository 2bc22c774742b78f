"""Nonlinear recurrences, one position at a time, and the cells as they are written in papers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from rondo.kernels.nonlinear_rnn.cells import Cell
from rondo.kernels.segments import document_starts

States = Sequence[Tensor]


def lstm(state: States, x: States, r: States, b: States) -> tuple[Tensor, ...]:
    """(h, c) after a step; x, r and b are what inputs, state and bias give to (i, f, z, o)."""
    _, c = state
    i, f, z, o = (x + r + b for x, r, b in zip(x, r, b, strict=True))
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(z)
    return torch.sigmoid(o) * torch.tanh(c), c


def gru(state: States, x: States, r: States, b: States) -> tuple[Tensor, ...]:
    """h after a step; gates (r, z, n), with a fourth bias beside the state's part of n."""
    (h,) = state
    reset, keep = (torch.sigmoid(x[g] + r[g] + b[g]) for g in (0, 1))
    return (keep * h + (1 - keep) * torch.tanh(x[2] + b[2] + reset * (r[2] + b[3])),)


def elman(state: States, x: States, r: States, b: States) -> tuple[Tensor, ...]:
    """h after a step."""
    return (torch.tanh(x[0] + r[0] + b[0]),)


def slstm(state: States, x: States, r: States, b: States) -> tuple[Tensor, ...]:
    """(h, c, n, m) after a step; gates (i, f, z, o)."""
    _, c, n, m = state
    i, f, z, o = (x + r + b for x, r, b in zip(x, r, b, strict=True))
    forget = F.logsigmoid(f) + torch.where(n == 0, -torch.inf, m.detach())
    m = torch.maximum(i, forget).detach()
    i, f = torch.exp(i - m), torch.exp(forget - m)
    c = f * c + i * torch.tanh(z)
    n = f * n + i
    return torch.sigmoid(o) * c / n, c, n, m


_STEPS: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "lstm": lstm,
    "gru": gru,
    "elman": elman,
    "slstm": slstm,
}


def nonlinear_rnn(
    cell: Cell,
    gates: Tensor,
    recurrent: Tensor,
    bias: Tensor | None,
    first: Tensor,
    segment_ids: Tensor | None,
    cut: bool,
) -> tuple[Tensor, Tensor]:
    """Arguments and results as for `chunked.nonlinear_rnn`."""
    step, dtype = _STEPS[cell.name], gates.dtype
    if bias is None:
        bias = recurrent.new_zeros(len(cell.biases), *gates.shape[3:])
    starts = None if segment_ids is None else document_starts(segment_ids)
    state, outputs = first, []
    for t, x in enumerate(gates.to(recurrent.dtype).unbind(1)):
        if starts is not None:
            state = torch.where(starts[:, t, None, None, None], 0.0, state)
        h = state[:, 0].detach() if cut else state[:, 0]
        r = torch.einsum("ghoi,bhi->gbho", recurrent, h)
        state = torch.stack(step(state.unbind(1), x.unbind(1), r, bias), 1)
        outputs.append(state[:, 0])
    return torch.stack(outputs, 1).to(dtype), state
