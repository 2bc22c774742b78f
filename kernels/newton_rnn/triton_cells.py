"""The passes of `newton_rnn` in Triton: a program walks along a chunk of a row for some channels.

Channels know nothing of each other, so that a program's state, its Jacobians' product and its sums
of gradients stay in registers; every number of a row passes once. States are `(N, B, T, W)`, what
belongs to chunks `(N, B, C, W)`, all float32. The state of a ParaLSTM is (c, h), of a ParaGRU h.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rondo.kernels.scan.triton_scan import place
from rondo.kernels.triton_support import tanh

PARA_GRU = tl.constexpr(0)
PARA_LSTM = tl.constexpr(1)
AHEAD = tl.constexpr(4)
"""Positions whose gates are on their way at a time: they do not wait for the state."""


@triton.jit
def row_of(values, which: tl.constexpr, width, column, inside):
    """A row of `(R, W)`, or zeros of None."""
    if values is None:
        row = tl.zeros(column.shape, tl.float32)
    else:
        row = tl.load(values + which * width + column, mask=inside, other=0.0)
    return row


@triton.jit
def gate_of(gates, position, which: tl.constexpr, width, column, inside, bias):
    """What inputs and bias contribute to a gate, of `(B, T, 3, W)`."""
    at = gates + (position * 3 + which) * width + column
    return tl.load(at, mask=inside, other=0.0).to(tl.float32) + bias


@triton.jit
def para_gru(h, g_z, g_r, g_n, a_z, a_r, a_n):
    """h', its derivative by h, those by the three pre-activations, and what a_n is multiplied by;
    formulas as in `cells.ParaGRU`."""
    z, r = tl.sigmoid(g_z + a_z * h), tl.sigmoid(g_r + a_r * h)
    reset = h * r
    n = tanh(g_n + a_n * reset)
    by_z = (n - h) * z * (1.0 - z)
    by_n = z * (1.0 - n * n)
    by_r = by_n * a_n * h * r * (1.0 - r)
    jacobian = 1.0 - z + by_z * a_z + by_r * a_r + by_n * a_n * r
    return h + z * (n - h), jacobian, by_z, by_r, by_n, reset


@triton.jit
def para_lstm(c, h, g_f, g_o, g_z, a_f, a_o, a_z, c_f, c_o):
    """c', h', the derivatives of c' by c and by h and of h' by c', and those of c', h', c' by the
    pre-activations of f, o, z; formulas as in `cells.ParaLSTM`."""
    f, z = tl.sigmoid(g_f + a_f * h + c_f * c), tanh(g_z + a_z * h)
    after = f * c + (1.0 - f) * z
    o = tl.sigmoid(g_o + a_o * h + c_o * after)
    shown = tanh(after)
    by_f, by_z = (c - z) * f * (1.0 - f), (1.0 - f) * (1.0 - z * z)
    by_o = shown * o * (1.0 - o)
    by_c = o * (1.0 - shown * shown) + by_o * c_o
    return after, o * shown, f + by_f * c_f, by_f * a_f + by_z * a_z, by_c, by_f, by_o, by_z


@triton.jit(do_not_specialize=["batch", "time", "size", "chunks"])
def sweep(
    gates, weights, bias, starts, borders, states, ends, products,
    batch, time, size, chunks, blocks, width,
    CELL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """States, the chunks' ends, and (unless None) the products `(N, N, B, C, W)` of the Jacobians
    on the way, all chunks from their `borders`."""
    row, chunk, column, inside = place(tl.program_id(0), chunks, blocks, width, BLOCK)
    a_0 = row_of(weights, 0, width, column, inside)
    a_1 = row_of(weights, 1, width, column, inside)
    a_2 = row_of(weights, 2, width, column, inside)
    b_0 = row_of(bias, 0, width, column, inside)
    b_1 = row_of(bias, 1, width, column, inside)
    b_2 = row_of(bias, 2, width, column, inside)
    span = (row * 0 + batch) * chunks * width  # numbers of a variable of all chunks
    whole = (row * 0 + batch) * time * width
    here = (row * chunks + chunk) * width + column
    first = tl.load(borders + here, mask=inside, other=0.0)
    one, none = tl.full((BLOCK,), 1.0, tl.float32), tl.zeros((BLOCK,), tl.float32)
    if CELL == PARA_LSTM:
        c_f = row_of(weights, 3, width, column, inside)
        c_o = row_of(weights, 4, width, column, inside)
        c, h = first, tl.load(borders + span + here, mask=inside, other=0.0)
        p_cc, p_ch, p_hc, p_hh = one, none, none, one
    else:
        h, p_hh = first, one
    for t in tl.range(
        chunk * size, tl.minimum(chunk * size + size, row * 0 + time), num_stages=AHEAD
    ):
        position = row * time + t
        g_0 = gate_of(gates, position, 0, width, column, inside, b_0)
        g_1 = gate_of(gates, position, 1, width, column, inside, b_1)
        g_2 = gate_of(gates, position, 2, width, column, inside, b_2)
        if starts is not None:
            fresh = tl.load(starts + position) != 0
            h = tl.where(fresh, 0.0, h)
        to = states + position * width + column
        if CELL == PARA_LSTM:
            if starts is not None:
                c = tl.where(fresh, 0.0, c)
            c, h, c_c, c_h, by_c, _, by_o, _ = para_lstm(
                c, h, g_0, g_1, g_2, a_0, a_1, a_2, c_f, c_o
            )
            tl.store(to, c, mask=inside)
            tl.store(to + whole, h, mask=inside)
            if products is not None:
                if starts is not None:
                    p_cc, p_ch = tl.where(fresh, 0.0, p_cc), tl.where(fresh, 0.0, p_ch)
                    p_hc, p_hh = tl.where(fresh, 0.0, p_hc), tl.where(fresh, 0.0, p_hh)
                p_cc, p_ch = c_c * p_cc + c_h * p_hc, c_c * p_ch + c_h * p_hh
                p_hc, p_hh = by_c * p_cc + by_o * a_1 * p_hc, by_c * p_ch + by_o * a_1 * p_hh
        else:
            h, jacobian, _, _, _, _ = para_gru(h, g_0, g_1, g_2, a_0, a_1, a_2)
            tl.store(to, h, mask=inside)
            if products is not None:
                if starts is not None:
                    p_hh = tl.where(fresh, 0.0, p_hh)
                p_hh = jacobian * p_hh
    if CELL == PARA_LSTM:
        tl.store(ends + here, c, mask=inside)
        tl.store(ends + span + here, h, mask=inside)
        if products is not None:
            tl.store(products + here, p_cc, mask=inside)
            tl.store(products + span + here, p_ch, mask=inside)
            tl.store(products + 2 * span + here, p_hc, mask=inside)
            tl.store(products + 3 * span + here, p_hh, mask=inside)
    else:
        tl.store(ends + here, h, mask=inside)
        if products is not None:
            tl.store(products + here, p_hh, mask=inside)


@triton.jit(do_not_specialize=["batch", "chunks"])
def enter(
    products, rest, first, entering, last, batch, chunks, blocks, width,
    VARIABLES: tl.constexpr, REVERSE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What enters each chunk, when `first` `(N, B, 1, W)` enters the first one (in reverse, the
    last) and each hands on `products` times what enters plus `rest`; `last` is what comes out."""
    row, _, column, inside = place(tl.program_id(0), 1, blocks, width, BLOCK)
    span = (row * 0 + batch) * chunks * width
    size = (row * 0 + batch) * width
    at = row * width + column
    x = tl.load(first + at, mask=inside, other=0.0)
    if VARIABLES == 2:
        y = tl.load(first + size + at, mask=inside, other=0.0)
    for i in tl.range(0, chunks, num_stages=AHEAD):
        chunk = chunks - 1 - i if REVERSE else i
        here = (row * chunks + chunk) * width + column
        tl.store(entering + here, x, mask=inside)
        before = x
        x = tl.load(products + here, mask=inside, other=0.0) * before
        x += tl.load(rest + here, mask=inside, other=0.0)
        if VARIABLES == 2:
            tl.store(entering + span + here, y, mask=inside)
            x += tl.load(products + span + here, mask=inside, other=0.0) * y
            y = tl.load(products + 3 * span + here, mask=inside, other=0.0) * y
            y += tl.load(products + 2 * span + here, mask=inside, other=0.0) * before
            y += tl.load(rest + span + here, mask=inside, other=0.0)
    tl.store(last + at, x, mask=inside)
    if VARIABLES == 2:
        tl.store(last + size + at, y, mask=inside)
