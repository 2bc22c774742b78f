"""The loop of `triton_cells.py` backwards: gradients of the parts and of the first state.

The gradient of the weights is a sum over all positions and does not belong on the chip: it is one
product after the loop.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rondo.kernels.nonlinear_rnn.triton_cells import (
    ELMAN,
    GRU,
    LSTM,
    SLSTM,
    log_sigmoid,
    matrix_of,
    times,
)
from rondo.kernels.triton_support import tanh


@triton.jit(do_not_specialize=["B", "T"])
def backward_kernel(
    weights, starts, parts, path, dout, dlast, dparts, dfirst, B, T,
    H: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, CELL: tl.constexpr,
    STATES: tl.constexpr, GATES: tl.constexpr, PARTS: tl.constexpr,
    ROWS: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    """Fills dparts like parts and dfirst `(S, H, B, D)` like dlast, but for states that no
    gradient passes through; dout is `(B, T, H, D)`."""
    program = tl.program_id(0).to(tl.int64)
    head, row, zero = program % H, program // H * ROWS, program * 0
    line, column = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    rows = row + line
    live = rows < B
    mask = live[:, None] & (column < D)[None, :]
    lanes = (zero + B) * H
    size = lanes * D
    span = (zero + T + 1) * size
    tile = line[:, None] * D + column[None, :]
    tile_of_parts = line[:, None] * (PARTS * D) + column[None, :]
    lane = (head * B + row) * D
    dh = tl.load(dlast + lane + tile, mask=mask, other=0.0)
    if STATES > 1:
        dc = tl.load(dlast + size + lane + tile, mask=mask, other=0.0)
    if CELL == SLSTM:
        dn = tl.load(dlast + 2 * size + lane + tile, mask=mask, other=0.0)
    w0 = matrix_of(weights, 0, head, H, D, WIDTH, GATES, True, TURNED)
    w1 = matrix_of(weights, 1, head, H, D, WIDTH, GATES, True, TURNED)
    w2 = matrix_of(weights, 2, head, H, D, WIDTH, GATES, True, TURNED)
    w3 = matrix_of(weights, 3, head, H, D, WIDTH, GATES, True, TURNED)
    for back in range(T):
        t = zero + T - 1 - back
        position = rows * T + t
        place = dout + position[:, None] * (H * D) + head * D + column[None, :]
        dh += tl.load(place, mask=mask, other=0.0).to(tl.float32)
        part = (t * lanes + head * B + row) * (PARTS * D)
        before = path + t * size + lane
        after = before + size
        if starts is not None:
            fresh = (tl.load(starts + position, mask=live, other=0) != 0)[:, None]
        if CELL == ELMAN:
            h = tl.load(after + tile, mask=mask, other=0.0)
            d0 = dh * (1.0 - h * h)
            tl.store(dparts + part + tile_of_parts, d0, mask=mask)
            dh = times(d0, w0, TURNED)
        else:
            first = tl.load(parts + part + tile_of_parts, mask=mask, other=0.0)
            second = tl.load(parts + part + D + tile_of_parts, mask=mask, other=0.0)
            third = tl.load(parts + part + 2 * D + tile_of_parts, mask=mask, other=0.0)
            fourth = tl.load(parts + part + 3 * D + tile_of_parts, mask=mask, other=0.0)
        if CELL == GRU:  # parts r, z, g, n
            h = tl.load(before + tile, mask=mask, other=0.0)
            if starts is not None:
                h = tl.where(fresh, 0.0, h)
            through = dh * (1.0 - second) * (1.0 - fourth * fourth)
            d0 = through * third * first * (1.0 - first)
            d1 = dh * (h - fourth) * second * (1.0 - second)
            d2 = through * first
            tl.store(dparts + part + 3 * D + tile_of_parts, through, mask=mask)
            dh = dh * second
        if CELL == LSTM:  # parts o, i, f, z
            c = tl.load(before + span + tile, mask=mask, other=0.0)
            if starts is not None:
                c = tl.where(fresh, 0.0, c)
            shown = tanh(tl.load(after + span + tile, mask=mask, other=0.0))
            d3 = dh * shown * first * (1.0 - first)
            dc += dh * first * (1.0 - shown * shown)
            d0 = dc * fourth * second * (1.0 - second)
            d1 = dc * c * third * (1.0 - third)
            d2 = dc * second * (1.0 - fourth * fourth)
            dc = dc * third
            tl.store(dparts + part + tile_of_parts, d3, mask=mask)
            tl.store(dparts + part + D + tile_of_parts, d0, mask=mask)
            tl.store(dparts + part + 2 * D + tile_of_parts, d1, mask=mask)
            tl.store(dparts + part + 3 * D + tile_of_parts, d2, mask=mask)
        if CELL == SLSTM:  # parts o, z, i, f
            c = tl.load(before + span + tile, mask=mask, other=0.0)
            n = tl.load(before + 2 * span + tile, mask=mask, other=0.0)
            m = tl.load(before + 3 * span + tile, mask=mask, other=0.0)
            if starts is not None:
                c, n = tl.where(fresh, 0.0, c), tl.where(fresh, 0.0, n)
                m = tl.where(fresh, -float("inf"), m)
            norm = tl.load(after + 2 * span + tile, mask=mask, other=1.0)
            ratio = tl.load(after + span + tile, mask=mask, other=0.0) / norm
            largest = tl.load(after + 3 * span + tile, mask=mask, other=0.0)
            forget = tl.exp(log_sigmoid(fourth) + m - largest)
            write = tl.exp(third - largest)
            d3 = dh * ratio * first * (1.0 - first)
            dc += dh * first / norm
            dn -= dh * ratio * first / norm
            d2 = dc * write * (1.0 - second * second)
            d0 = (dc * second + dn) * write
            d1 = (dc * c + dn * n) * forget * tl.sigmoid(-fourth)
            dc, dn = dc * forget, dn * forget
            tl.store(dparts + part + tile_of_parts, d3, mask=mask)
            tl.store(dparts + part + D + tile_of_parts, d2, mask=mask)
            tl.store(dparts + part + 2 * D + tile_of_parts, d0, mask=mask)
            tl.store(dparts + part + 3 * D + tile_of_parts, d1, mask=mask)
        if CELL == GRU:
            tl.store(dparts + part + tile_of_parts, d0, mask=mask)
            tl.store(dparts + part + D + tile_of_parts, d1, mask=mask)
            tl.store(dparts + part + 2 * D + tile_of_parts, d2, mask=mask)
        if STATES > 1:
            dh = times(d3, w3, TURNED)
        if CELL != ELMAN:
            dh += times(d0, w0, TURNED)
            dh += times(d1, w1, TURNED)
            dh += times(d2, w2, TURNED)
        if starts is not None:
            dh = tl.where(fresh, 0.0, dh)
            if STATES > 1:
                dc = tl.where(fresh, 0.0, dc)
            if CELL == SLSTM:
                dn = tl.where(fresh, 0.0, dn)
    tl.store(dfirst + lane + tile, dh, mask=mask)
    if STATES > 1:
        tl.store(dfirst + size + lane + tile, dc, mask=mask)
    if CELL == SLSTM:
        tl.store(dfirst + 2 * size + lane + tile, dn, mask=mask)
