"""What the Triton kernels of gated linear attention share: tiles, decay factors, masks.

A chunk is C positions from `start`; `row` is the index `b * T` of the row's first position, and
positions from T on count as keys of zero that forget nothing. Every exponent is a sum of log decays
or a difference that is at most 0, and what may not be seen is masked before `exp`.
"""

from __future__ import annotations

import triton
import triton.language as tl

NONE = tl.constexpr(0)
HEAD = tl.constexpr(1)
KEY = tl.constexpr(2)


@triton.jit
def load_rows(x, rows, stride, live, columns, width):
    """`(rows, columns)` of the matrix at x with `stride` elements a row; 0 beyond `live` and
    `width`. What is far into a tensor is added to x before: here offsets are 32 bits, since a tile
    of 64-bit ones would fill the registers."""
    mask = live[:, None] & (columns < width)[None, :]
    return tl.load(x + (rows[:, None] * stride + columns[None, :]), mask=mask, other=0.0)


@triton.jit
def store_rows(x, rows, stride, live, columns, width, values):
    mask = live[:, None] & (columns < width)[None, :]
    tl.store(x + (rows[:, None] * stride + columns[None, :]), values, mask=mask)


@triton.jit
def document_mask(ids, row, start, T, C: tl.constexpr, LEAVE: tl.constexpr):
    """`(C,)`: the document of a position was open before the chunk, or is still open after it."""
    index = tl.arange(0, C)
    live = index < T - start
    mine = tl.load(ids + row + start + index, mask=live, other=0)
    if LEAVE:
        border = tl.load(ids + row + tl.minimum(start + C, T) - 1)
    else:
        border = tl.load(ids + row + tl.maximum(start - 1, 0))
    return (mine == border) & live


@triton.jit
def stays_open(ids, row, start, T, C: tl.constexpr):
    """Whether one document spans the chunk and was open before it."""
    before = tl.load(ids + row + tl.maximum(start - 1, 0))
    return before == tl.load(ids + row + tl.minimum(start + C, T) - 1)


@triton.jit
def row_factors(
    g,
    ids,
    row,
    start,
    head,
    T,
    H: tl.constexpr,
    C: tl.constexpr,
    GATE: tl.constexpr,
    LEAVE: tl.constexpr,
):
    """`(C,)` decay from before the chunk to each position, or from each to the chunk's end (one a
    head; a decay a key channel is left to `key_factors`)."""
    index = tl.arange(0, C)
    factors = tl.full((C,), 1.0, tl.float32)
    if GATE == HEAD:
        # The sum after a position is a sum of its own: a difference would lose its digits.
        index += LEAVE
        live = (index < C) & (index < T - start)
        steps = tl.load(g + (row + start) * H + head + index * H, mask=live, other=0.0)
        steps = steps.to(tl.float32)
        factors = tl.exp(tl.cumsum(steps, 0, reverse=LEAVE))
    if ids is not None:
        factors = tl.where(document_mask(ids, row, start, T, C, LEAVE), factors, 0.0)
    return factors


@triton.jit
def sums_inside(
    g,
    left,
    columns,
    H: tl.constexpr,
    K: tl.constexpr,
    C: tl.constexpr,
    AFTER: tl.constexpr,
):
    """`(C, columns)` log decays a key channel, g at the first of C positions of which `left` are in
    the row: summed up to each one, or after each one."""
    index = tl.arange(0, C) + AFTER
    live = (index < C) & (index < left)
    steps = load_rows(g, index, H * K, live, columns, K)
    return tl.cumsum(steps.to(tl.float32), 0, reverse=AFTER)


@triton.jit
def key_factors(
    g,
    row,
    start,
    head,
    columns,
    T,
    H: tl.constexpr,
    K: tl.constexpr,
    C: tl.constexpr,
    LEAVE: tl.constexpr,
):
    """`(C, columns)`: as `row_factors`, for one decay a key channel, without documents."""
    g += ((row + start) * H + head) * K
    return tl.exp(sums_inside(g, T - start, columns, H, K, C, LEAVE))


@triton.jit
def same_document(ids, row, start, T, C: tl.constexpr):
    """`(C, C)`: both positions lie in one document."""
    index = tl.arange(0, C)
    mine = tl.load(ids + row + start + index, mask=index < T - start, other=0)
    return mine[:, None] == mine[None, :]


@triton.jit
def pair_factors(
    g,
    ids,
    row,
    start,
    head,
    T,
    H: tl.constexpr,
    C: tl.constexpr,
    GATE: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """`(C, C)` decay from column j to row i, 0 for j > i and between documents; or its transpose.

    Sums are kept as two float32 (the second holds what the first rounds away), so that differences
    keep their digits beside decays of -1e4.
    """
    index = tl.arange(0, C)
    visible = index[:, None] >= index[None, :]
    if TRANSPOSED:
        visible = index[:, None] <= index[None, :]
    if ids is not None:
        visible = visible & same_document(ids, row, start, T, C)
    if GATE == HEAD:
        steps = tl.load(g + (row + start) * H + head + index * H, mask=index < T - start, other=0.0)
        # exp(-800) is 0: the bound changes nothing and keeps -inf out of differences.
        sums = tl.cumsum(tl.maximum(steps.to(tl.float64), -800.0), 0)
        high = sums.to(tl.float32)
        low = (sums - high.to(tl.float64)).to(tl.float32)
        between = (high[:, None] - high[None, :]) + (low[:, None] - low[None, :])
        if TRANSPOSED:
            between = -between
        factors = tl.exp(tl.where(visible, tl.minimum(between, 0.0), float("-inf")))
    else:
        factors = tl.where(visible, 1.0, 0.0)
    return factors


@triton.jit
def sums_before(x):
    """`(C,)`: the sum of the elements before each one. Not a sum less the element: it would lose
    its digits beside a large one."""
    before, _ = tl.associative_scan((tl.zeros_like(x), x), 0, _join_sums)
    return before


@triton.jit
def _join_sums(before1, sum1, before2, sum2):
    return sum1 + before2, sum1 + sum2


@triton.jit
def load_states(
    states,
    first,
    reach,
    place,
    head,
    chunks,
    keys,
    values,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    GATE: tl.constexpr,
):
    """`(keys, values)` of the state that chunk `place` (batch * chunks + chunk) meets, of states
    `(B, N, H, K, V)` float32: with first `(B, H, K, V)` they are those of a walk from zero, and
    what reach (see `walk_kernel`) leaves of first is added."""
    tile = load_rows(states + (place * H + head) * K * V, keys, V, keys < K, values, V)
    if first is not None:
        row = place // chunks
        start = load_rows(first + (row * H + head) * K * V, keys, V, keys < K, values, V)
        at = (place + row) * H + head
        if GATE == KEY:
            left = tl.load(reach + at * K + keys, mask=keys < K, other=0.0)
            tile += left[:, None] * start
        else:
            tile += tl.load(reach + at) * start
    return tile
