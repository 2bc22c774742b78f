"""The gradient of a solution in Triton: chunks from their ends, with the Jacobians of the solution.

All but the gradient of the state can be read ahead, since states are known.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rondo.kernels.newton_rnn.triton_cells import (
    AHEAD,
    PARA_LSTM,
    gate_of,
    para_gru,
    para_lstm,
    row_of,
)
from rondo.kernels.scan.triton_scan import place
from rondo.kernels.triton_support import narrow


@triton.jit
def _before(states, before, row, t, time, width, column, inside):
    """The state before position t."""
    at = states + (row * time + t - 1) * width + column
    at = tl.where(t > 0, at, before + row * width + column)
    return tl.load(at, mask=inside, other=0.0)


@triton.jit(do_not_specialize=["batch", "time", "size", "chunks"])
def pull(
    gates, weights, bias, starts, states, before, grad, entering,
    at_gates, at_weights, at_bias, products, left,
    batch, time, size, chunks, blocks, width,
    CELL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """From `grad` `(B, T, W)` of the outputs (or None) and the gradient `entering` each chunk at
    its end (None: zero): what is `left` for the state before each chunk, and either `products`
    `(N, N, B, C, W)`, the derivative of `left` by what enters, or (None) the gradients of the
    gates, and of weights `(R, B, C, W)` and bias `(3, B, C, W)` (or None) summed over chunks."""
    row, chunk, column, inside = place(tl.program_id(0), chunks, blocks, width, BLOCK)
    a_0 = row_of(weights, 0, width, column, inside)
    a_1 = row_of(weights, 1, width, column, inside)
    a_2 = row_of(weights, 2, width, column, inside)
    b_0 = row_of(bias, 0, width, column, inside)
    b_1 = row_of(bias, 1, width, column, inside)
    b_2 = row_of(bias, 2, width, column, inside)
    span = (row * 0 + batch) * chunks * width
    here = (row * chunks + chunk) * width + column
    one, none = tl.full((BLOCK,), 1.0, tl.float32), tl.zeros((BLOCK,), tl.float32)
    s_0, s_1, s_2, w_0, w_1, w_2, dh = none, none, none, none, none, none, none
    if CELL == PARA_LSTM:
        size_of_first = (row * 0 + batch) * width
        whole = size_of_first * time
        c_f = row_of(weights, 3, width, column, inside)
        c_o = row_of(weights, 4, width, column, inside)
        w_3, w_4, dc = none, none, none
        p_cc, p_ch, p_hc, p_hh = one, none, none, one
        if entering is not None:
            dc = tl.load(entering + here, mask=inside, other=0.0)
            dh = tl.load(entering + span + here, mask=inside, other=0.0)
    else:
        p_hh = one
        if entering is not None:
            dh = tl.load(entering + here, mask=inside, other=0.0)
    begin, end = chunk * size, tl.minimum(chunk * size + size, row * 0 + time)
    for i in tl.range(0, end - begin, num_stages=AHEAD):
        t = end - 1 - i
        position = row * time + t
        g_0 = gate_of(gates, position, 0, width, column, inside, b_0)
        g_1 = gate_of(gates, position, 1, width, column, inside, b_1)
        g_2 = gate_of(gates, position, 2, width, column, inside, b_2)
        x = _before(states, before, row, t, time, width, column, inside)
        if grad is not None:
            dh += tl.load(grad + position * width + column, mask=inside, other=0.0)
        if starts is not None:
            fresh = tl.load(starts + position) != 0
            x = tl.where(fresh, 0.0, x)
        if CELL == PARA_LSTM:
            y = _before(states + whole, before + size_of_first, row, t, time, width, column, inside)
            if starts is not None:
                y = tl.where(fresh, 0.0, y)
            after, _, c_c, c_h, by_c, by_f, by_o, by_z = para_lstm(
                x, y, g_0, g_1, g_2, a_0, a_1, a_2, c_f, c_o
            )
            dc += by_c * dh
            d_0, d_1, d_2 = by_f * dc, by_o * dh, by_z * dc
            dc, dh = c_c * dc, c_h * dc + by_o * a_1 * dh
            if products is not None:
                p_cc, p_ch = p_cc + by_c * p_hc, p_ch + by_c * p_hh
                p_hc, p_hh = c_h * p_cc + by_o * a_1 * p_hc, c_h * p_ch + by_o * a_1 * p_hh
                p_cc, p_ch = c_c * p_cc, c_c * p_ch
            else:
                w_0, w_1, w_2 = w_0 + d_0 * y, w_1 + d_1 * y, w_2 + d_2 * y
                w_3, w_4 = w_3 + d_0 * x, w_4 + d_1 * after
        else:
            _, jacobian, by_z, by_r, by_n, reset = para_gru(x, g_0, g_1, g_2, a_0, a_1, a_2)
            d_0, d_1, d_2 = by_z * dh, by_r * dh, by_n * dh
            dh = jacobian * dh
            if products is not None:
                p_hh = jacobian * p_hh
            else:
                w_0, w_1, w_2 = w_0 + d_0 * x, w_1 + d_1 * x, w_2 + d_2 * reset
        if products is None:
            to = at_gates + position * 3 * width + column
            kind: tl.constexpr = at_gates.dtype.element_ty
            tl.store(to, narrow(d_0, kind), mask=inside)
            tl.store(to + width, narrow(d_1, kind), mask=inside)
            tl.store(to + 2 * width, narrow(d_2, kind), mask=inside)
            s_0, s_1, s_2 = s_0 + d_0, s_1 + d_1, s_2 + d_2
        if starts is not None:
            dh, p_hh = tl.where(fresh, 0.0, dh), tl.where(fresh, 0.0, p_hh)
            if CELL == PARA_LSTM:
                dc, p_cc = tl.where(fresh, 0.0, dc), tl.where(fresh, 0.0, p_cc)
                p_ch, p_hc = tl.where(fresh, 0.0, p_ch), tl.where(fresh, 0.0, p_hc)
    if CELL == PARA_LSTM:
        tl.store(left + here, dc, mask=inside)
        tl.store(left + span + here, dh, mask=inside)
        if products is not None:
            tl.store(products + here, p_cc, mask=inside)
            tl.store(products + span + here, p_ch, mask=inside)
            tl.store(products + 2 * span + here, p_hc, mask=inside)
            tl.store(products + 3 * span + here, p_hh, mask=inside)
        else:
            tl.store(at_weights + 3 * span + here, w_3, mask=inside)
            tl.store(at_weights + 4 * span + here, w_4, mask=inside)
    else:
        tl.store(left + here, dh, mask=inside)
        if products is not None:
            tl.store(products + here, p_hh, mask=inside)
    if products is None:
        tl.store(at_weights + here, w_0, mask=inside)
        tl.store(at_weights + span + here, w_1, mask=inside)
        tl.store(at_weights + 2 * span + here, w_2, mask=inside)
        if at_bias is not None:
            tl.store(at_bias + here, s_0, mask=inside)
            tl.store(at_bias + span + here, s_1, mask=inside)
            tl.store(at_bias + 2 * span + here, s_2, mask=inside)
