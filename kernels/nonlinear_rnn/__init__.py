"""Nonlinear recurrences whose gates see the whole state of their head, one position after another.

`g_t = R h_{t-1} + x_t + b` with R a dense matrix a head (FlashRNN, arXiv 2412.07752): no scan
computes this, and it tracks state that no scan can.
"""

from __future__ import annotations

import difflib
from typing import Any

import torch
from torch import Tensor

from rondo.kernels.backend import choose, full_precision, triton_refusal
from rondo.kernels.nonlinear_rnn import chunked, reference
from rondo.kernels.nonlinear_rnn.cells import CELLS, Cell
from rondo.kernels.tiles import has_numbers

__all__ = ["CELLS", "nonlinear_rnn"]

WIDEST, WIDEST_FLOAT32 = 128, 64
"""Channels of a head whose recurrent weights, of bfloat16 or wider, a Triton program can hold."""


def _triton(*arguments: Any) -> tuple[Tensor, Tensor]:
    from rondo.kernels.nonlinear_rnn import triton

    return triton.nonlinear_rnn(*arguments[:-1])  # with a cut it is refused


_IMPLEMENTATIONS = {
    "chunked": chunked.nonlinear_rnn,
    "reference": reference.nonlinear_rnn,
    "triton": _triton,
}


def nonlinear_rnn(
    cell: str,
    gates: Tensor,
    recurrent: Tensor,
    *,
    bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    segment_ids: Tensor | None = None,
    gradient_recurrent_cut: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Runs a cell over every row; the state restarts from zero at each new document.

    Gates below hold what inputs, state and bias contribute: `g~ = x_g + R_g h + b_g`.

        "lstm"   gates i, f, z, o    state (h, c)
            c' = σ(f~) c + σ(i~) tanh(z~)      h' = σ(o~) tanh(c')
        "gru"    gates r, z, n       state h       bias r, z, n, and one for R_n h
            h' = σ(z~) h + (1 - σ(z~)) tanh(x_n + b_n + σ(r~) (R_n h + b_h))
        "elman"  gate  n             state h
            h' = tanh(n~)
        "slstm"  gates i, f, z, o    state (h, c, n, m)       (xLSTM, arXiv 2405.04517)
            m' = max(i~, log σ(f~) + m)        i = exp(i~ - m')     f = exp(log σ(f~) + m - m')
            c' = f c + i tanh(z~)              n' = f n + i         h' = σ(o~) c' / n'

    A document begins with zeros; where n is 0 no token has been seen, and m' = i~. Nothing that is
    computed depends on m, which only keeps numbers small: it counts as a constant, so that
    gradients of c and n are those at this m. The first three are `torch.nn`'s cells: LSTM there
    has the order i, f, z, o too and two biases that add up; GRU's second bias of n is `b_h`.

    Args:
        cell: "lstm", "gru", "elman" or "slstm".
        gates: `(B, T, G, H, D)`: what the inputs contribute to each gate.
        recurrent: `(G, H, D, D)`, `(out, in)` of each gate and head.
        bias: `(G, H, D)`, of a GRU `(4, H, D)`.
        initial_state: `(B, S, H, D)` before position 0, of its document.
        segment_ids: `(B, T)` integers, non-decreasing in a row, one id a document.
        gradient_recurrent_cut: take h for a constant in `R h`: gradients reach earlier positions
            through the other states alone (and a GRU's `σ(z~) h`), and R as ever.
        backend: "auto", "reference" (autograd through the cells as above), "chunked" (a loop
            with a backward pass written by hand) or "triton" (the loop in one kernel, heads of up
            to 128 channels with recurrent weights of bfloat16, else of 64; no cut).

    Returns:
        h `(B, T, H, D)` in the dtype of gates, and the state `(B, S, H, D)` after the last
        position, float32 (float64 for float64 gates), in which everything is computed. Both are
        differentiable once in gates, recurrent, bias and state.

    Raises:
        ValueError: a name, shape, dtype or backend does not fit.
    """
    if cell not in CELLS:
        near = difflib.get_close_matches(str(cell), CELLS, n=1, cutoff=0.3)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"cell is {cell!r}, expected one of {', '.join(CELLS)}{hint}")
    known = CELLS[cell]
    _check(known, gates, recurrent, bias, initial_state, segment_ids)
    refusal = _refusal(gradient_recurrent_cut, gates, recurrent, bias, initial_state)
    run = choose("nonlinear_rnn", backend, _IMPLEMENTATIONS, gates.device, refusal)
    kind = torch.promote_types(gates.dtype, torch.float32)
    batch, time, _, heads, dim = gates.shape
    if initial_state is None:
        initial_state = gates.new_zeros(batch, len(known.states), heads, dim, dtype=kind)
    first = initial_state.to(kind)
    if not has_numbers():  # a step of all positions costs what a step of each does
        gates, segment_ids = gates.flatten(0, 1).unsqueeze(1), None
        first = first.repeat_interleave(time, 0)
    with full_precision(gates.device):
        bias = None if bias is None else bias.to(kind)
        if run is not _triton:  # its products take bfloat16 as it is
            recurrent = recurrent.to(kind)
        h, state = run(known, gates, recurrent, bias, first, segment_ids, gradient_recurrent_cut)
    return h.view(batch, time, heads, dim), state[-batch:]


def _refusal(cut: bool, gates: Tensor, recurrent: Tensor, *others: Tensor | None) -> str | None:
    """Why the Triton kernels cannot serve a call, or None."""
    if cut:
        return "it has no gradient_recurrent_cut"
    widest = WIDEST if recurrent.dtype == torch.bfloat16 else WIDEST_FLOAT32
    if gates.shape[-1] > widest:
        kind = str(recurrent.dtype).removeprefix("torch.")
        return (
            f"with recurrent weights of {kind} it takes heads of up to {widest} channels, whose "
            f"weights stay on the chip, got {gates.shape[-1]}"
        )
    return triton_refusal(gates, recurrent, *others)


def _check(
    cell: Cell,
    gates: Tensor,
    recurrent: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    segment_ids: Tensor | None,
) -> None:
    if gates.dim() != 5 or gates.shape[1] == 0 or not gates.is_floating_point():
        raise ValueError(
            f"gates has shape {tuple(gates.shape)} and dtype {gates.dtype}, expected floating "
            "point (batch, time, gates, heads, dim) with at least one position"
        )
    batch, time, count, heads, dim = gates.shape
    if count != len(cell.gates):
        raise ValueError(
            f"gates has {count} gates at dimension 2, expected {len(cell.gates)}: "
            f"{', '.join(cell.gates)}"
        )
    for name, x, expected, meaning in (
        ("recurrent", recurrent, (count, heads, dim, dim), "(G, H, D, D)"),
        ("bias", bias, (len(cell.biases), heads, dim), f"({', '.join(cell.biases)}) of (H, D)"),
        (
            "initial_state",
            initial_state,
            (batch, len(cell.states), heads, dim),
            f"B of ({', '.join(cell.states)}) of (H, D)",
        ),
    ):
        if x is not None and tuple(x.shape) != expected:
            raise ValueError(f"{name} has shape {tuple(x.shape)}, expected {meaning} = {expected}")
    if segment_ids is not None and (
        tuple(segment_ids.shape) != (batch, time) or segment_ids.is_floating_point()
    ):
        raise ValueError(
            f"segment_ids has shape {tuple(segment_ids.shape)} and dtype {segment_ids.dtype}, "
            f"expected integers (B, T) = {(batch, time)}"
        )
