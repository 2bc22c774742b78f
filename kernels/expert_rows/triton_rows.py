"""Triton kernels between tokens and the rows of experts; a program holds ROWS of either."""

import triton
import triton.language as tl

from rondo.kernels.triton_support import narrow


@triton.jit(do_not_specialize=["rows", "tokens"])
def rows_kernel(
    x, order, weights, y, out, dots, rows, tokens,
    D: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`out_r = w · x[order_r // K]` with the weight of the row's choice, 0 for filling; and of
    each choice that has a row the dot product of x and y, `dots` `(n, K)`. Without weights filling
    gets the last token; without y no dot products are made."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = row < rows
    choice = tl.load(order + row, mask=live, other=0).to(tl.int64)
    real = live & (choice < tokens.to(tl.int64) * K)
    token = tl.minimum(choice // K, tokens - 1)
    if weights is not None:
        share = tl.load(weights + choice, mask=real, other=0.0).to(tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    for start in range(0, D, BLOCK):
        column = start + tl.arange(0, BLOCK)
        mask = live[:, None] & (column < D)[None, :]
        value = tl.load(x + token[:, None] * D + column[None, :], mask=mask, other=0.0)
        if y is not None:
            own = tl.load(y + row[:, None] * D + column[None, :], mask=mask, other=0.0)
            total += tl.sum(value.to(tl.float32) * own.to(tl.float32), axis=1)
        if weights is not None:
            value = narrow(value.to(tl.float32) * share[:, None], out.dtype.element_ty)
        tl.store(out + row[:, None] * D + column[None, :], value, mask=mask)
    if y is not None:
        tl.store(dots + choice, total, mask=real)


@triton.jit(do_not_specialize=["tokens", "rows"])
def sums_kernel(
    y, places, weights, out, tokens, rows,
    D: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`out_i = sum_j w_ij y[places_ij]`, over the choices that have a row."""
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = token < tokens
    for start in range(0, D, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = (column < D)[None, :]
        total = tl.zeros((ROWS, BLOCK), tl.float32)
        for slot in tl.static_range(K):
            choice = token * K + slot
            place = tl.load(places + choice, mask=live, other=0).to(tl.int64)
            real = live & (place < rows)
            at = y + place[:, None] * D + column[None, :]
            value = tl.load(at, mask=real[:, None] & inside, other=0.0).to(tl.float32)
            if weights is not None:
                share = tl.load(weights + choice, mask=real, other=0.0).to(tl.float32)
                value = value * share[:, None]
            total += value
        at = out + token[:, None] * D + column[None, :]
        tl.store(at, narrow(total, out.dtype.element_ty), mask=live[:, None] & inside)
