"""Nonlinear recurrences on a GPU: a program takes 16 rows of one head from end to end (FlashRNN,
arXiv 2412.07752); kernels in `triton_cells.py`.

Weights of float16 are widened to float32: gradients that are fed back do not fit its exponents.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from rondo.kernels.nonlinear_rnn.cells import CELLS, Cell
from rondo.kernels.nonlinear_rnn.chunked import gate_gradients, placed, weight_gradients
from rondo.kernels.nonlinear_rnn.triton_cells import forward_kernel
from rondo.kernels.nonlinear_rnn.triton_cells_back import backward_kernel
from rondo.kernels.segments import document_starts
from rondo.kernels.triton_configs import Config
from rondo.kernels.triton_support import Compilation, launch, opaque


def nonlinear_rnn(
    cell: Cell,
    gates: Tensor,
    recurrent: Tensor,
    bias: Tensor | None,
    first: Tensor,
    segment_ids: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Arguments and results as for `chunked.nonlinear_rnn`, but weights of any dtype."""
    starts = None if segment_ids is None else document_starts(segment_ids)
    return _Loop.apply(cell, gates, recurrent, bias, first, starts)


class _Loop(torch.autograd.Function):
    """Keeps the parts and the states of all positions."""

    @staticmethod
    def forward(ctx: Any, cell: Cell, *arguments: Any) -> tuple[Tensor, Tensor]:
        gates, recurrent, bias, first, starts = arguments
        weights = recurrent if recurrent.dtype == torch.bfloat16 else recurrent.float()
        h, parts, path = _forward(cell.name, gates, weights, bias, first, starts)
        ctx.cell, ctx.has_bias = cell, bias is not None
        ctx.dtypes = gates.dtype, recurrent.dtype
        ctx.save_for_backward(parts, path, weights, starts)
        return h, path[:, -1].permute(2, 0, 1, 3).contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh: Tensor, dlast: Tensor) -> tuple[Any, ...]:
        parts, path, weights, starts = ctx.saved_tensors
        cell, dtype = ctx.cell, ctx.dtypes[0]
        dparts, dfirst = _backward(cell.name, weights, starts, parts, path, dh, dlast)
        before = path[0, :-1]
        if starts is not None:
            before = before.masked_fill(starts.t()[:, None, :, None], 0.0)
        dbias = None
        if ctx.has_bias:
            dbias = placed(dparts.sum(0).sum(1).transpose(0, 1), cell.offsets)
        dweights = weight_gradients(cell, dparts, before).to(ctx.dtypes[1])
        return None, gate_gradients(cell, dparts, dtype), dweights, dbias, dfirst, None


def _fake_forward(
    cell: str,
    gates: Tensor,
    weights: Tensor,
    bias: Tensor | None,
    first: Tensor,
    starts: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, time, _, heads, dim = gates.shape
    known = CELLS[cell]
    parts = first.new_empty(time, heads, batch, len(known.inputs), dim)
    path = first.new_empty(len(known.states), time + 1, heads, batch, dim)
    return gates.new_empty(batch, time, heads, dim), parts, path


@opaque("triton_nonlinear_rnn", _fake_forward)
def _forward(
    cell: str,
    gates: Tensor,
    weights: Tensor,
    bias: Tensor | None,
    first: Tensor,
    starts: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """h `(B, T, H, D)`, parts and path: see `forward_kernel`."""
    h, parts, path = _fake_forward(cell, gates, weights, bias, first, starts)
    path[:, 0] = first.permute(1, 2, 0, 3)
    CELLS[cell].begin(path[:, 0])
    gates, weights, bias, starts = _contiguous(gates, weights, bias, starts)
    batch, time, _, heads, dim = gates.shape

    def start(config: Config) -> None:
        forward_kernel[(heads * triton.cdiv(batch, config["ROWS"]),)](
            gates, weights, bias, starts, parts, path, h, batch, time,
            **_constants(cell, heads, dim), **config,
        )  # fmt: skip

    if h.numel():
        launch("nonlinear_rnn_forward", "*", weights, (cell, dim), start)
    return h, parts, path


def _fake_backward(
    cell: str,
    weights: Tensor,
    starts: Tensor | None,
    parts: Tensor,
    path: Tensor,
    dh: Tensor,
    dlast: Tensor,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(parts), torch.zeros_like(dlast)


@opaque("triton_nonlinear_rnn_backward", _fake_backward)
def _backward(
    cell: str,
    weights: Tensor,
    starts: Tensor | None,
    parts: Tensor,
    path: Tensor,
    dh: Tensor,
    dlast: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients of the parts `(T, H, B, P, D)` and of the first state `(B, S, H, D)`."""
    dparts = torch.empty_like(parts)
    dlast = dlast.permute(1, 2, 0, 3).contiguous()
    dfirst = torch.zeros_like(dlast)
    weights, starts, dh = _contiguous(weights, starts, dh)
    time, heads, batch, _, dim = parts.shape

    def start(config: Config) -> None:
        backward_kernel[(heads * triton.cdiv(batch, config["ROWS"]),)](
            weights, starts, parts, path, dh, dlast, dparts, dfirst, batch, time,
            **_constants(cell, heads, dim), **config,
        )  # fmt: skip

    if dh.numel():
        launch("nonlinear_rnn_backward", "*", weights, (cell, dim), start)
    return dparts, dfirst.permute(2, 0, 1, 3).contiguous()


def _contiguous(*tensors: Tensor | None) -> Any:
    return [None if x is None else x.contiguous() for x in tensors]


def _constants(cell: str, heads: int, dim: int) -> dict[str, Any]:
    known = CELLS[cell]
    return {
        "H": heads,
        "D": dim,
        "WIDTH": max(16, triton.next_power_of_2(dim)),
        "CELL": list(CELLS).index(cell),
        "STATES": len(known.states),
        "GATES": len(known.gates),
        "PARTS": len(known.inputs),
    }


def ahead_of_time() -> list[Compilation]:
    """Every cell, in bfloat16 and in float32, with documents."""
    listed = []
    cases = (
        ("elman", 32, "fp32"),
        ("gru", 64, "bf16"),
        ("lstm", 64, "fp32"),
        ("slstm", 128, "bf16"),
    )
    for cell, dim, dtype in cases:
        types = dict.fromkeys(("gates", "weights", "out", "dout"), f"*{dtype}")
        types |= dict.fromkeys(("bias", "parts", "path", "dlast", "dparts", "dfirst"), "*fp32")
        types |= {"starts": "*i1", "B": "i32", "T": "i32"}
        constants = _constants(cell, 12, dim)
        listed += [
            Compilation("nonlinear_rnn_forward", forward_kernel, types, constants),
            Compilation("nonlinear_rnn_backward", backward_kernel, types, constants),
        ]
    return listed
