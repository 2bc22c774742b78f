"""The cells of `nonlinear_rnn` in Triton: one program takes some rows of one head through all
positions, with the head's recurrent weights and the state on the chip.

Kept are, as in `chunked.py`, the parts `(T, H, B, P, D)` of the gates (`cells.py` says which) and
the states `(S, T + 1, H, B, D)`, float32. `rows` of the batch and `column` of a head make a tile;
what is beyond B and D counts as zeros, with which every cell stays finite.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rondo.kernels.triton_support import INTERPRETED, dot, narrow, tanh

LSTM = tl.constexpr(0)
GRU = tl.constexpr(1)
ELMAN = tl.constexpr(2)
SLSTM = tl.constexpr(3)


@triton.jit
def log_sigmoid(x):
    return tl.minimum(x, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(x)))


@triton.jit
def matrix_of(
    weights, gate: tl.constexpr, head, H: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
    GATES: tl.constexpr, BACK: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    """`(in, out)` of a gate and head, of weights `(G, H, out, in)`, or with BACK `(out, in)`; the
    other way about if TURNED; one that is not there is not read."""
    first, second = tl.arange(0, WIDTH)[:, None], tl.arange(0, WIDTH)[None, :]
    if BACK != TURNED:
        at = first * D + second
    else:
        at = second * D + first
    mask = (first < D) & (second < D) & (gate < GATES)
    return tl.load(weights + (gate * H + head) * D * D + at, mask=mask, other=0.0)


@triton.jit
def times(x, matrix, TURNED: tl.constexpr):
    """Float32 x times the matrix of a gate, which comes transposed if TURNED. For one of bfloat16 x
    is the sum of two of them, so that what is fed back is not rounded to 8 bits (wider than 64
    channels it is: registers would run out); for one of float32 both are sums of three, which are
    products of float32 but for the last bit, on tensor cores.

    TURNED is for chips whose compiler divides the rows of a product among all warps: those of the
    matrix then, since each warp would keep a whole matrix for the 16 rows of x."""
    if TURNED:
        x = tl.trans(x)
    if matrix.dtype != tl.bfloat16:
        product = _product(x, matrix, TURNED)
    else:
        high = narrow(x, tl.bfloat16)
        product = _product(high, matrix, TURNED)
        if matrix.shape[0] <= 64:
            product += _product(narrow(x - high.to(tl.float32), tl.bfloat16), matrix, TURNED)
    return tl.trans(product) if TURNED else product


@triton.jit
def _product(x, matrix, TURNED: tl.constexpr):
    first, second = (matrix, x) if TURNED else (x, matrix)
    if INTERPRETED or matrix.dtype == tl.bfloat16:  # the interpreter knows no sums of three
        product = dot(first, second)
    else:
        product = tl.dot(first, second, input_precision="bf16x6", out_dtype=tl.float32)
    return product


@triton.jit
def _given(
    x, gate, bias, place, head, column, mask, H: tl.constexpr, D: tl.constexpr
):  # fmt: skip
    """What inputs and bias `place` contribute to a gate."""
    value = tl.load(x + gate * H * D, mask=mask, other=0.0).to(tl.float32)
    if bias is not None:
        value += _bias(bias, place, head, column, H, D)
    return value


@triton.jit
def _bias(bias, place, head, column, H: tl.constexpr, D: tl.constexpr):
    at = bias + (place * H + head) * D + column
    return tl.load(at, mask=column < D, other=0.0)[None, :]


@triton.jit(do_not_specialize=["B", "T"])
def forward_kernel(
    gates, weights, bias, starts, parts, path, out, B, T,
    H: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, CELL: tl.constexpr,
    STATES: tl.constexpr, GATES: tl.constexpr, PARTS: tl.constexpr,
    ROWS: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    """Fills parts, path but for its first states, and out `(B, T, H, D)`, from gates
    `(B, T, G, H, D)`, weights `(G, H, D, D)`, bias `(.., H, D)` and starts `(B, T)`."""
    program = tl.program_id(0).to(tl.int64)
    head, row, zero = program % H, program // H * ROWS, program * 0
    line, column = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    rows = row + line
    live = rows < B
    mask = live[:, None] & (column < D)[None, :]
    lanes = (zero + B) * H
    span = (zero + T + 1) * lanes * D
    # In a tile offsets are 32 bits: it would fill the registers with those of 64.
    tile = line[:, None] * D + column[None, :]
    tile_of_parts = line[:, None] * (PARTS * D) + column[None, :]
    first = path + (head * B + row) * D
    h = tl.load(first + tile, mask=mask, other=0.0)
    if STATES > 1:
        c = tl.load(first + span + tile, mask=mask, other=0.0)
    if CELL == SLSTM:
        n = tl.load(first + 2 * span + tile, mask=mask, other=0.0)
        m = tl.load(first + 3 * span + tile, mask=mask, other=0.0)
    w0 = matrix_of(weights, 0, head, H, D, WIDTH, GATES, False, TURNED)
    w1 = matrix_of(weights, 1, head, H, D, WIDTH, GATES, False, TURNED)
    w2 = matrix_of(weights, 2, head, H, D, WIDTH, GATES, False, TURNED)
    w3 = matrix_of(weights, 3, head, H, D, WIDTH, GATES, False, TURNED)
    for t in range(T):
        position = rows * T + t
        if starts is not None:
            fresh = (tl.load(starts + position, mask=live, other=0) != 0)[:, None]
            h = tl.where(fresh, 0.0, h)
            if STATES > 1:
                c = tl.where(fresh, 0.0, c)
            if CELL == SLSTM:
                n, m = tl.where(fresh, 0.0, n), tl.where(fresh, -float("inf"), m)
        x = gates + position[:, None] * (GATES * H * D) + head * D + column[None, :]
        part = parts + ((zero + t) * lanes + head * B + row) * (PARTS * D)
        p0 = times(h, w0, TURNED)
        if CELL == ELMAN:
            h = tanh(p0 + _given(x, 0, bias, 0, head, column, mask, H, D))
        else:
            p1 = times(h, w1, TURNED)
            p2 = times(h, w2, TURNED)
            p0 += _given(x, 0, bias, 0, head, column, mask, H, D)
            p1 += _given(x, 1, bias, 1, head, column, mask, H, D)
        if CELL == GRU:
            r, z = tl.sigmoid(p0), tl.sigmoid(p1)
            if bias is not None:
                p2 += _bias(bias, 3, head, column, H, D)
            new = tanh(_given(x, 2, bias, 2, head, column, mask, H, D) + r * p2)
            h = z * h + (1.0 - z) * new
            tl.store(part + tile_of_parts, r, mask=mask)
            tl.store(part + D + tile_of_parts, z, mask=mask)
            tl.store(part + 2 * D + tile_of_parts, p2, mask=mask)
            tl.store(part + 3 * D + tile_of_parts, new, mask=mask)
        if STATES > 1:
            p3 = times(h, w3, TURNED)
            z = tanh(p2 + _given(x, 2, bias, 2, head, column, mask, H, D))
            o = tl.sigmoid(p3 + _given(x, 3, bias, 3, head, column, mask, H, D))
            tl.store(part + tile_of_parts, o, mask=mask)
        if CELL == LSTM:
            i, f = tl.sigmoid(p0), tl.sigmoid(p1)
            c = f * c + i * z
            h = o * tanh(c)
            tl.store(part + D + tile_of_parts, i, mask=mask)
            tl.store(part + 2 * D + tile_of_parts, f, mask=mask)
            tl.store(part + 3 * D + tile_of_parts, z, mask=mask)
        if CELL == SLSTM:
            forget = log_sigmoid(p1) + m
            m = tl.maximum(p0, forget)
            forget, write = tl.exp(forget - m), tl.exp(p0 - m)
            c = forget * c + write * z
            n = forget * n + write
            h = o * c / n
            tl.store(part + D + tile_of_parts, z, mask=mask)
            tl.store(part + 2 * D + tile_of_parts, p0, mask=mask)
            tl.store(part + 3 * D + tile_of_parts, p1, mask=mask)
        after = first + (zero + t + 1) * lanes * D
        tl.store(after + tile, h, mask=mask)
        if STATES > 1:
            tl.store(after + span + tile, c, mask=mask)
        if CELL == SLSTM:
            tl.store(after + 2 * span + tile, n, mask=mask)
            tl.store(after + 3 * span + tile, m, mask=mask)
        place = out + position[:, None] * (H * D) + head * D + column[None, :]
        tl.store(place, narrow(h, out.dtype.element_ty), mask=mask)
