"""Triton kernels for a decay of its own for every key channel.

The decay of a pair is inside its dot product and has to be split between the two factors. A chunk
is cut into blocks of 16: a reader meets the writers of earlier blocks through the point where its
own block begins, one product of matrices; inside a block columns are taken from last to first, and
the sum of log decays since the column grows by one step each time. No exponent is above 0, and none
is a difference of sums.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rondo.kernels.delta_rule.triton_tiles import (
    BLOCK,
    key_steps,
    load_rows,
    store_rows,
    visible,
)
from rondo.kernels.triton_support import dot, narrow


@triton.jit
def within(g, base, head, left, A, keys, H: tl.constexpr, K: tl.constexpr):
    """`(16, keys)` sums of log decay from the start of block A to each of its positions."""
    rows = tl.arange(0, BLOCK) + A * BLOCK
    return tl.cumsum(key_steps(g, base, head, rows, rows < left, keys, H, K), 0)


@triton.jit
def behind(g, base, head, left, A, keys, H: tl.constexpr, K: tl.constexpr):
    """`(16, keys)` sums of log decay from after each position of block A to the block's end."""
    index = tl.arange(1, BLOCK + 1)
    rows = index + A * BLOCK
    live = (index < BLOCK) & (rows < left)
    return tl.cumsum(key_steps(g, base, head, rows, live, keys, H, K), 0, reverse=True)


@triton.jit
def over(g, base, head, left, A, B, keys, H: tl.constexpr, K: tl.constexpr):
    """`(keys,)` sums of log decay over the blocks from A to before B."""
    rows = tl.arange(0, BLOCK)
    total = tl.zeros_like(keys).to(tl.float32)
    for block in range(A, B):
        here = rows + block * BLOCK
        total += tl.sum(key_steps(g, base, head, here, here < left, keys, H, K), 0)
    return total


@triton.jit
def pick_row(tile, j):
    """Row j of `(16, N)`."""
    return tl.sum(tl.where((tl.arange(0, BLOCK) == j)[:, None], tile, 0.0), 0)


@triton.jit
def across(
    x, k, g, base, head, left, A, B, G: tl.constexpr, H: tl.constexpr, K: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    """Decayed dot products `(16, 16)` of block A of x with the earlier block B of k."""
    index = tl.arange(0, BLOCK)
    rows, columns = index + A * BLOCK, index + B * BLOCK
    at = (base * G + head // (H // G)) * K
    products = tl.zeros((BLOCK, BLOCK), tl.float32)
    for block in range(0, K, BK):
        keys = block + tl.arange(0, BK)
        readers = load_rows(x + at, rows, G * K, rows < left, keys, K).to(tl.float32)
        writers = load_rows(k + at, columns, G * K, columns < left, keys, K).to(tl.float32)
        readers *= tl.exp2(within(g, base, head, left, A, keys, H, K))
        until = behind(g, base, head, left, B, keys, H, K)
        writers *= tl.exp2(until + over(g, base, head, left, B + 1, A, keys, H, K)[None, :])
        kind = k.dtype.element_ty
        products += dot(narrow(readers, kind), tl.trans(narrow(writers, kind)))
    return products


@triton.jit
def inside(
    x, k, g, base, head, left, A, G: tl.constexpr, H: tl.constexpr, K: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    """Decayed dot products `(16, 16)` of block A of x with the same block of k, for j <= i."""
    index = tl.arange(0, BLOCK)
    rows = index + A * BLOCK
    at = (base * G + head // (H // G)) * K
    products = tl.zeros((BLOCK, BLOCK), tl.float32)
    for block in range(0, K, BK):
        keys = block + tl.arange(0, BK)
        readers = load_rows(x + at, rows, G * K, rows < left, keys, K).to(tl.float32)
        writers = load_rows(k + at, rows, G * K, rows < left, keys, K).to(tl.float32)
        steps = key_steps(g, base, head, rows, rows < left, keys, H, K)
        since = tl.zeros((BLOCK, BK), tl.float32)
        for step in range(BLOCK):
            j = 15 - step
            writer = pick_row(writers, j)
            seen = (index >= j)[:, None]
            column = readers * writer[None, :] * tl.exp2(tl.where(seen, since, float("-inf")))
            products += tl.where(index[None, :] == j, tl.sum(column, 1)[:, None], 0.0)
            since += tl.where(seen, pick_row(steps, j)[None, :], 0.0)
    return products


@triton.jit(do_not_specialize=["T"])
def scores_kernel(
    q, k, g, ids, scores, T, G: tl.constexpr, H: tl.constexpr, K: tl.constexpr, C: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    """Decayed dot products of queries and keys `(B, T, H, C)` for one chunk and head and a block of
    16 queries, 0 between documents; what is above the blocks of the diagonal is not written."""
    program = tl.program_id(0).to(tl.int64)
    blocks: tl.constexpr = C // BLOCK
    reader = (program % blocks).to(tl.int32)
    head = program // blocks % H
    place = program // (blocks * H)
    chunks = tl.cdiv(T, C)
    start = place % chunks * C
    base, left = place // chunks * T + start, T - start
    for writer in range(reader):
        products = across(q, k, g, base, head, left, reader, writer, G, H, K, BK)
        store_block(scores, ids, base, head, left, reader, writer, H, C, products)
    products = inside(q, k, g, base, head, left, reader, G, H, K, BK)
    store_block(scores, ids, base, head, left, reader, reader, H, C, products)


@triton.jit
def store_block(x, ids, base, head, left, A, B, H: tl.constexpr, C: tl.constexpr, products):
    """Writes block (A, B) of x `(B, T, H, C)` where row and column are of one document."""
    index = tl.arange(0, BLOCK)
    rows, columns = index + A * BLOCK, index + B * BLOCK
    products = tl.where(visible(ids, base, rows, columns, left), products, 0.0)
    products = narrow(products, x.dtype.element_ty)
    store_rows(x + (base * H + head) * C, rows, H * C, rows < left, columns, C, products)
