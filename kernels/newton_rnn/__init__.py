"""Nonlinear recurrences whose channels see their own state only, solved in parallel over time.

`h_t = f(h_{t-1}, x_t)` is a system of equations for all h at once. Newton's method turns it into a
few linear recurrences (ParaRNN, arXiv 2510.21450; DEER, arXiv 2309.12252); see `newton.py`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rondo.kernels.backend import choose, full_precision, triton_refusal
from rondo.kernels.newton_rnn import chunked, reference
from rondo.kernels.newton_rnn.cells import Cell, ParaGRU, ParaLSTM
from rondo.kernels.newton_rnn.functions import FunctionCell
from rondo.kernels.newton_rnn.neighbours import Neighbours
from rondo.kernels.newton_rnn.newton import Health, Policy
from rondo.kernels.tiles import has_numbers

__all__ = ["CELLS", "FunctionCell", "Health", "Neighbours", "NewtonOutput", "newton_rnn"]

CELLS: dict[str, ParaGRU | ParaLSTM] = {"para_gru": ParaGRU(), "para_lstm": ParaLSTM()}
"""Cells with hand-written derivatives, by name."""


def _triton(*arguments: Any) -> tuple[Tensor, Tensor, Health]:
    from rondo.kernels.newton_rnn import triton

    return triton.newton_rnn(*arguments)


_IMPLEMENTATIONS = {
    "chunked": chunked.newton_rnn,
    "reference": reference.newton_rnn,
    "triton": _triton,
}
_TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}


class NewtonOutput(NamedTuple):
    """What `newton_rnn` returns."""

    h: Tensor
    """`(B, T, ...)` in the dtype of the gates."""
    state: Tensor
    """After the last position, `(B, ...)`, or `(B, N, ...)` of a cell with N variables; float32
    (float64 for float64 gates)."""
    health: Health
    """How the solution was found, not differentiable."""


def newton_rnn(
    cell: str | Callable[..., Any] | FunctionCell,
    gates: Tensor,
    recurrent: Tensor,
    *,
    bias: Tensor | None = None,
    iterations: int = 3,
    max_iterations: int = 10,
    tolerance: float | None = None,
    initial_state: Tensor | None = None,
    segment_ids: Tensor | None = None,
    backend: str = "auto",
    neighbours: Neighbours | None = None,
) -> NewtonOutput:
    """Runs a cell over every row; the state restarts from zero at each new document.

    `"para_gru"` has gates (z, r, n) and recurrent weights (a_z, a_r, a_n):

        z = σ(g_z + a_z h)    r = σ(g_r + a_r h)    n = tanh(g_n + a_n h r)
        h' = (1 - z) h + z n

    `"para_lstm"` has gates (f, o, z), weights (a_f, a_o, a_z, c_f, c_o) and the state (c, h):

        f = σ(g_f + a_f h + c_f c)     z = tanh(g_z + a_z h)     c' = f c + (1 - f) z
        o = σ(g_o + a_o h + c_o c')    h' = o tanh(c')

    Newton's method stops as soon as the residual is within the tolerance. If it still is not after
    `max_iterations`, the rows are done one position at a time: slow, but right, and counted.

    Args:
        cell: a name of `CELLS`; or a function `(h, gates, weights) -> h`, elementwise over
            channels; or a `FunctionCell` of one with more state variables.
        gates: `(B, T, G, ...)`: what the inputs contribute to each gate, `B x`.
        recurrent: `(R, ...)`: what a channel's own state is multiplied by.
        bias: `(G, ...)`, added to the gates.
        iterations: Newton iterations that are expected; those beyond are counted.
        max_iterations: those after which the method has failed.
        tolerance: largest residual of a solution, each relative to its own state (at least 1).
            None: 1e-6, for float64 gates 1e-12.
        initial_state: `(B, ...)` (`(B, N, ...)`) before position 0, of its document.
        segment_ids: `(B, T)` integers, non-decreasing in a row, one id a document.
        backend: "auto", "reference" (a loop over time), "chunked" (Newton's method) or "triton"
            (the same with its passes over time in kernels; cells by name).
        neighbours: holders of the other stretches of these rows; then `initial_state` is the one
            before the first stretch, and the state returned the one after this stretch.

    Returns:
        Outputs (of an LSTM, h), the state, and the health of the solution. All computed in float32
        (float64 for float64 gates); differentiable once in gates, weights, bias and state. The
        gradient is that of the solution and takes one linear solve, whatever the iterations were.

    Raises:
        ValueError: a name, shape, number or backend does not fit.
    """
    known = _cell(cell)
    _check(known, gates, recurrent, bias, segment_ids)
    _check_numbers(iterations, max_iterations, tolerance)
    kind = torch.promote_types(gates.dtype, torch.float32)
    batch, shape = len(gates), gates.shape[3:]
    expected = (batch, *shape) if known.variables == 1 else (batch, known.variables, *shape)
    if initial_state is None:
        initial_state = gates.new_zeros(expected, dtype=kind)
    elif tuple(initial_state.shape) != expected:
        raise ValueError(
            f"initial_state has shape {tuple(initial_state.shape)}, expected {expected}"
        )
    refusal = (
        "it has cells by name, not functions"
        if isinstance(known, FunctionCell)
        else triton_refusal(gates, recurrent, bias, initial_state)
    )
    run = choose("newton_rnn", backend, _IMPLEMENTATIONS, gates.device, refusal)
    with full_precision(gates.device):
        weights = recurrent.to(kind).flatten(1)
        flat = gates.flatten(3)
        if isinstance(known, FunctionCell) and has_numbers():
            known.check(flat, weights)
        h, state, health = run(
            known,
            flat,
            weights,
            None if bias is None else bias.to(kind).flatten(1),
            initial_state.to(kind).reshape(batch, known.variables, -1),
            segment_ids,
            Policy(iterations, max_iterations, tolerance or _TOLERANCE[kind]),
            neighbours,
        )
    return NewtonOutput(
        h.to(gates.dtype).view(*gates.shape[:2], *shape), state.view(expected), health
    )


def _cell(cell: str | Callable[..., Any] | FunctionCell) -> Cell:
    if isinstance(cell, FunctionCell):
        return cell
    if callable(cell):
        return FunctionCell(cell)
    if cell not in CELLS:
        near = difflib.get_close_matches(str(cell), CELLS, n=1, cutoff=0.3)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"cell is {cell!r}, expected one of {', '.join(CELLS)} or a function{hint}"
        )
    return CELLS[cell]


def _check(
    cell: Cell, gates: Tensor, recurrent: Tensor, bias: Tensor | None, segment_ids: Tensor | None
) -> None:
    if gates.dim() < 4 or gates.shape[1] == 0 or not gates.is_floating_point():
        raise ValueError(
            f"gates has shape {tuple(gates.shape)} and dtype {gates.dtype}, expected floating "
            "point (batch, time, gates, ...) with at least one position"
        )
    channels = tuple(gates.shape[3:])
    count = rows = None
    if isinstance(cell, ParaGRU | ParaLSTM):
        count, rows = len(cell.gates), len(cell.weights)
        if gates.shape[2] != count:
            raise ValueError(
                f"gates has {gates.shape[2]} gates at dimension 2, expected {count}: "
                f"{', '.join(cell.gates)}"
            )
    if tuple(recurrent.shape[1:]) != channels or rows not in (None, len(recurrent)):
        names = ", ".join(cell.weights) if isinstance(cell, ParaGRU | ParaLSTM) else "R"
        raise ValueError(
            f"recurrent has shape {tuple(recurrent.shape)}, expected rows ({names}) of {channels}"
        )
    if bias is not None and bias.shape != gates.shape[2:]:
        raise ValueError(f"bias has shape {tuple(bias.shape)}, expected {tuple(gates.shape[2:])}")
    if segment_ids is not None and (
        segment_ids.shape != gates.shape[:2] or segment_ids.is_floating_point()
    ):
        raise ValueError(
            f"segment_ids has shape {tuple(segment_ids.shape)} and dtype {segment_ids.dtype}, "
            f"expected integers (B, T) = {tuple(gates.shape[:2])}"
        )


def _check_numbers(iterations: int, max_iterations: int, tolerance: float | None) -> None:
    if not 0 <= iterations <= max_iterations:
        raise ValueError(
            f"iterations is {iterations}, expected from 0 to max_iterations = {max_iterations}"
        )
    if tolerance is not None and not 0 < tolerance < 1:
        raise ValueError(f"tolerance is {tolerance}, expected between 0 and 1")
