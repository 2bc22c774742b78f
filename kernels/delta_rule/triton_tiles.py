"""What the Triton kernels of the gated delta rule share: tiles, decays within a chunk, masks.

A chunk is the C positions from `start`, `row` the number `b * T` of the row's first position and
`base` their sum; `left` positions of it are in the row, the others count as keys of zero that
forget nothing. Decays are powers of two; every exponent is a sum of log decays, at most 0, and
what may not be seen is masked before.
"""

from __future__ import annotations

import triton
import triton.language as tl

NONE = tl.constexpr(0)
HEAD = tl.constexpr(1)
KEY = tl.constexpr(2)
BLOCK = tl.constexpr(16)
LOG2E = tl.constexpr(1.4426950408889634)
FLOOR = tl.constexpr(-16384.0)
GRID = tl.constexpr(4294967296.0)


@triton.jit
def load_rows(x, rows, stride, live, columns, width):
    """`(rows, columns)` of the matrix at x with `stride` elements a row; 0 beyond `live` and
    `width`. Far offsets are added to x before: a tile of 64-bit ones would fill the registers."""
    mask = live[:, None] & (columns < width)[None, :]
    return tl.load(x + (rows[:, None] * stride + columns[None, :]), mask=mask, other=0.0)


@triton.jit
def store_rows(x, rows, stride, live, columns, width, values):
    mask = live[:, None] & (columns < width)[None, :]
    tl.store(x + (rows[:, None] * stride + columns[None, :]), values, mask=mask)


@triton.jit
def load_lower(x, base, head, left, H: tl.constexpr, C: tl.constexpr):
    """The lower triangle `(C, C)` of one chunk and head of x `(B, T, H, C)`, 0 above; `left`
    positions of the chunk are in the row."""
    index = tl.arange(0, C)
    mask = (index[:, None] >= index[None, :]) & (index < left)[:, None]
    places = index[:, None] * (H * C) + index[None, :]
    return tl.load(x + (base * H + head) * C + places, mask=mask, other=0.0)


@triton.jit
def load_numbers(x, base, head, rows, left, H: tl.constexpr):
    """The numbers of one head at some rows of a chunk of x `(B, T, H)`, float32, 0 from T on."""
    return tl.load(x + base * H + head + rows * H, mask=rows < left, other=0.0).to(tl.float32)


@triton.jit
def head_steps(g, base, head, rows, left, H: tl.constexpr):
    """Log decays as multiples of 2^-32 in float64: sums of them are exact in any order, so that
    neither strong decays nor another document can be felt in the rounding of differences."""
    steps = load_numbers(g, base, head, rows, left, H).to(tl.float64)
    return tl.floor(tl.maximum(steps * LOG2E, FLOOR) * GRID + 0.5) / GRID


@triton.jit
def key_steps(g, base, head, rows, live, keys, H: tl.constexpr, K: tl.constexpr):
    """Log decays `(rows, keys)` of one head, float32."""
    steps = load_rows(g + (base * H + head) * K, rows, H * K, live, keys, K)
    return tl.maximum(steps.to(tl.float32) * LOG2E, FLOOR)


@triton.jit
def head_factors(g, ids, row, start, head, T, H: tl.constexpr, C: tl.constexpr, GATE: tl.constexpr):
    """Decay from the state before the chunk to each position `(C,)`, from each to the state after
    it `(C,)`, and from state to state; zero where a document ends between. A decay a key channel
    is left to `key_factors` and `key_through`."""
    index = tl.arange(0, C)
    left = T - start
    enter = tl.full((C,), 1.0, tl.float32)
    leave = tl.full((C,), 1.0, tl.float32)
    through = 1.0
    if GATE == HEAD:
        sums = tl.cumsum(head_steps(g, row + start, head, index, left, H), 0)
        last = tl.min(sums, 0)
        enter = tl.exp2(sums.to(tl.float32))
        leave = tl.exp2((last - sums).to(tl.float32))
        through = tl.exp2(last.to(tl.float32))
    if ids is not None:
        before = tl.load(ids + row + tl.maximum(start - 1, 0))
        after = tl.load(ids + row + tl.minimum(start + C, T) - 1)
        mine = tl.load(ids + row + start + index, mask=index < left, other=0)
        enter = tl.where(mine == before, enter, 0.0)
        leave = tl.where(mine == after, leave, 0.0)
        through = tl.where(before == after, through, 0.0)
    return enter, leave, through


@triton.jit
def key_factors(
    g, base, head, left, keys, H: tl.constexpr, K: tl.constexpr, C: tl.constexpr,
    LEAVE: tl.constexpr,
):  # fmt: skip
    """`(C, keys)` decay from before the chunk to each position, or from each to its end."""
    # The sum after a position is a sum of its own: a difference would lose its digits.
    index = tl.arange(0, C) + LEAVE
    steps = key_steps(g, base, head, index, (index < C) & (index < left), keys, H, K)
    return tl.exp2(tl.cumsum(steps, 0, reverse=LEAVE))


@triton.jit
def key_through(g, base, head, left, keys, H: tl.constexpr, K: tl.constexpr, C: tl.constexpr):
    """`(keys,)` decay over the whole chunk."""
    index = tl.arange(0, C)
    return tl.exp2(tl.sum(key_steps(g, base, head, index, index < left, keys, H, K), 0))


@triton.jit
def visible(ids, base, rows, columns, left):
    """`(rows, columns)`: the column is not after the row, and of its document."""
    seen = rows[:, None] >= columns[None, :]
    if ids is not None:
        reader = tl.load(ids + base + rows, mask=rows < left, other=0)
        writer = tl.load(ids + base + columns, mask=columns < left, other=0)
        seen = seen & (reader[:, None] == writer[None, :])
    return seen


@triton.jit
def pair_factors(g, ids, row, start, head, T, H: tl.constexpr, C: tl.constexpr, GATE: tl.constexpr):
    """`(C, C)` decay of a head from column j to row i, 0 for j > i and between documents."""
    index = tl.arange(0, C)
    seen = visible(ids, row + start, index, index, T - start)
    if GATE == HEAD:
        sums = tl.cumsum(head_steps(g, row + start, head, index, T - start, H), 0)
        between = (sums[:, None] - sums[None, :]).to(tl.float32)
        factors = tl.exp2(tl.where(seen, between, float("-inf")))
    else:
        factors = tl.where(seen, 1.0, 0.0)
    return factors
