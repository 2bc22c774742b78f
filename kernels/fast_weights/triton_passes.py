"""The passes of `fast_weights` between its products, in Triton.

`a` and `u` are the products with gate and up, `d` what comes back from the values through down. N
tokens of all rows and heads make rows of F numbers, without gaps.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rondo.kernels.triton_support import narrow


@triton.jit
def _places(rows, ROWS: tl.constexpr):
    """Rows of a program, for offsets in int64, and which of them there are."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    return row, row < rows


@triton.jit
def _numbers(values, at, mask):
    return tl.load(values + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _silu(a):
    """SiLU, its slope, and the slope of that."""
    s = tl.sigmoid(a)
    return a * s, s * (1.0 + a * (1.0 - s)), s * (1.0 - s) * (2.0 + a * (1.0 - 2.0 * s))


@triton.jit(do_not_specialize=["rows"])
def read_forward(
    a, u, hidden, rows, width, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """`hidden = SiLU(a) u`."""
    row, live = _places(rows, ROWS)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        at, mask = row[:, None] * width + column[None, :], live[:, None] & (column < width)[None, :]
        silu, _, _ = _silu(_numbers(a, at, mask))
        value = silu * _numbers(u, at, mask)
        tl.store(hidden + at, narrow(value, hidden.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def read_backward(
    a, u, grad, at_a, at_u, rows, width, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Gradients of a and u from that of `hidden`."""
    row, live = _places(rows, ROWS)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        at, mask = row[:, None] * width + column[None, :], live[:, None] & (column < width)[None, :]
        silu, slope, _ = _silu(_numbers(a, at, mask))
        given = _numbers(grad, at, mask)
        by_a = given * _numbers(u, at, mask) * slope
        tl.store(at_a + at, narrow(by_a, at_a.dtype.element_ty), mask=mask)
        tl.store(at_u + at, narrow(given * silu, at_u.dtype.element_ty), mask=mask)


@triton.jit
def _rates(rates, row, live):
    """The three of each token, `(ROWS, 1)`."""
    at = rates + row * 3
    gate = tl.load(at, mask=live, other=0.0)
    up = tl.load(at + 1, mask=live, other=0.0)
    return gate[:, None], up[:, None], tl.load(at + 2, mask=live, other=0.0)[:, None]


@triton.jit(do_not_specialize=["rows"])
def parts_forward(
    a, u, d, rates, gate, up, down, rows, width, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Factors of the three sums of gradients, as in `inner.parts`; rates `(N, 3)`."""
    row, live = _places(rows, ROWS)
    r_gate, r_up, r_down = _rates(rates, row, live)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        at, mask = row[:, None] * width + column[None, :], live[:, None] & (column < width)[None, :]
        silu, slope, _ = _silu(_numbers(a, at, mask))
        x, back = _numbers(u, at, mask), _numbers(d, at, mask)
        tl.store(gate + at, r_gate * back * x * slope, mask=mask)
        tl.store(up + at, r_up * back * silu, mask=mask)
        tl.store(down + at, r_down * silu * x, mask=mask)


@triton.jit(do_not_specialize=["rows"])
def parts_backward(
    a, u, d, rates, gate, up, down, at_a, at_u, at_d, at_rates, rows, width,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """From the gradients of the factors those of a, u, d and of the rates, which are sums over a
    token's row."""
    row, live = _places(rows, ROWS)
    r_gate, r_up, r_down = _rates(rates, row, live)
    s_gate = tl.zeros((ROWS,), tl.float32)
    s_up = tl.zeros((ROWS,), tl.float32)
    s_down = tl.zeros((ROWS,), tl.float32)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        at, mask = row[:, None] * width + column[None, :], live[:, None] & (column < width)[None, :]
        silu, slope, bend = _silu(_numbers(a, at, mask))
        x, back = _numbers(u, at, mask), _numbers(d, at, mask)
        by_gate, by_up = _numbers(gate, at, mask), _numbers(up, at, mask)
        by_down = _numbers(down, at, mask)
        s_gate += tl.sum(by_gate * back * x * slope, axis=1)
        s_up += tl.sum(by_up * back * silu, axis=1)
        s_down += tl.sum(by_down * silu * x, axis=1)
        by_gate, by_up, by_down = r_gate * by_gate, r_up * by_up, r_down * by_down
        by_slope = by_up * back + by_down * x
        tl.store(at_a + at, by_gate * back * x * bend + by_slope * slope, mask=mask)
        tl.store(at_u + at, by_gate * back * slope + by_down * silu, mask=mask)
        tl.store(at_d + at, by_gate * x * slope + by_up * silu, mask=mask)
    to = at_rates + row * 3
    tl.store(to, s_gate, mask=live)
    tl.store(to + 1, s_up, mask=live)
    tl.store(to + 2, s_down, mask=live)


@triton.jit(do_not_specialize=["rows", "own"])
def renew_forward(
    weights, step, targets, renewed, norms, rows, own, width,
    EPS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Rows of `weights + step` with the norms that `targets` `(own,)`, one for every `own` rows,
    are the squares of; and their own squared norms."""
    row, live = _places(rows, ROWS)
    column = tl.arange(0, WIDTH)
    at, mask = row[:, None] * width + column[None, :], live[:, None] & (column < width)[None, :]
    x = _numbers(weights, at, mask) + _numbers(step, at, mask)
    norm = tl.sum(x * x, axis=1) + EPS * EPS
    target = tl.load(targets + row % own, mask=live, other=0.0)
    tl.store(renewed + at, x * tl.sqrt(target / norm)[:, None], mask=mask)
    tl.store(norms + row, norm, mask=live)


@triton.jit(do_not_specialize=["rows", "own"])
def renew_backward(
    renewed, targets, norms, grad, at_sum, at_targets, rows, own, width,
    WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The gradient of `weights + step`, and of the target of every row `(rows,)`."""
    row, live = _places(rows, ROWS)
    column = tl.arange(0, WIDTH)
    at, mask = row[:, None] * width + column[None, :], live[:, None] & (column < width)[None, :]
    y, given = _numbers(renewed, at, mask), _numbers(grad, at, mask)
    norm = tl.load(norms + row, mask=live, other=1.0)
    target = tl.load(targets + row % own, mask=live, other=1.0)
    along = tl.sum(y * given, axis=1)
    # tl.sqrt of each: the product of two small squares is no float32.
    back = along / (tl.sqrt(target) * tl.sqrt(norm))
    by = given * tl.sqrt(target / norm)[:, None] - y * back[:, None]
    tl.store(at_sum + at, by, mask=mask)
    tl.store(at_targets + row, along / (2.0 * target), mask=live)
