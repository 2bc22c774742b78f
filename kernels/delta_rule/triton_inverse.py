"""Triton kernels that turn the overwrites of a chunk into plain writes: A = (I - N)^-1, W and U."""

from __future__ import annotations

import triton
import triton.language as tl

from rondo.kernels.delta_rule.triton_keys import across, inside, store_block
from rondo.kernels.delta_rule.triton_tiles import (
    BLOCK,
    HEAD,
    KEY,
    head_factors,
    head_steps,
    key_factors,
    load_lower,
    load_numbers,
    load_rows,
    store_rows,
    visible,
)
from rondo.kernels.triton_support import dot, narrow


@triton.jit
def _products(
    k, base, group, left, A: tl.constexpr, B: tl.constexpr, G: tl.constexpr, K: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    """Dot products of the keys of blocks A and B of 16 positions."""
    index = tl.arange(0, BLOCK)
    rows, columns = index + A * BLOCK, index + B * BLOCK
    keys_base = k + (base * G + group) * K
    products = tl.zeros((BLOCK, BLOCK), tl.float32)
    for block in range(0, K, BK):
        keys = block + tl.arange(0, BK)
        readers = load_rows(keys_base, rows, G * K, rows < left, keys, K)
        writers = load_rows(keys_base, columns, G * K, columns < left, keys, K)
        products += dot(readers, tl.trans(writers))
    return products


@triton.jit
def _decay_before(
    g, base, head, left, A: tl.constexpr, H: tl.constexpr, C: tl.constexpr, GATE: tl.constexpr
):  # fmt: skip
    """`(16,)` sums of a head's log decay from the chunk's start to each position of block A."""
    index = tl.arange(0, BLOCK)
    sums = tl.zeros((BLOCK,), tl.float64)
    if GATE == HEAD:
        earlier = tl.arange(0, C)
        steps = head_steps(g, base, head, earlier, tl.minimum(left, A * BLOCK), H)
        sums = tl.cumsum(head_steps(g, base, head, index + A * BLOCK, left, H), 0)
        sums += tl.sum(steps, 0)
    return sums


@triton.jit
def _block(
    k, beta, g, ids, base, head, left, A: tl.constexpr, B: tl.constexpr, before_a, before_b,
    G: tl.constexpr, H: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    """Block (A, B) `(16, 16)` of N, `-beta_i k_i . k_j` decayed for j < i, else 0."""
    index = tl.arange(0, BLOCK)
    rows, columns = index + A * BLOCK, index + B * BLOCK
    seen = visible(ids, base, rows, columns, left) & (rows[:, None] > columns[None, :])
    if GATE == KEY:
        if A == B:
            products = inside(k, k, g, base, head, left, A, G, H, K, BK)
        else:
            products = across(k, k, g, base, head, left, A, B, G, H, K, BK)
    else:
        products = _products(k, base, head // (H // G), left, A, B, G, K, BK)
    if GATE == HEAD:
        since = (before_a[:, None] - before_b[None, :]).to(tl.float32)
        products *= tl.exp2(tl.where(seen, since, float("-inf")))
    betas = load_numbers(beta, base, head, rows, left, H)
    return tl.where(seen, -betas[:, None] * products, 0.0)


@triton.jit
def _invert(block):
    """`(I - block)^-1` by elimination of columns; the block is strictly lower, float32."""
    index = tl.arange(0, BLOCK)
    for j in range(1, BLOCK - 1):
        column = tl.sum(tl.where(index[None, :] == j, block, 0.0), 1)
        row = tl.sum(tl.where(index[:, None] == j, block, 0.0), 0)
        block += column[:, None] * row[None, :]
    return tl.where(index[:, None] == index[None, :], 1.0, block)


@triton.jit(do_not_specialize=["T"])
def inverse_kernel(
    k, beta, g, ids, inverse, T, G: tl.constexpr, H: tl.constexpr, K: tl.constexpr,
    C: tl.constexpr, BK: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    """A of one chunk and head into `(B, T, H, C)`, without what is above the diagonal blocks.

    Blocks of 16 on the diagonal are inverted, and the ones below follow row by row of blocks,
    `A_ij = A_ii sum_m N_im A_mj`: no large terms cancel, so keys that are alike cost no accuracy.
    """
    program = tl.program_id(0).to(tl.int64)
    head, place = program % H, program // H
    chunks = tl.cdiv(T, C)
    start = place % chunks * C
    base, left = place // chunks * T + start, T - start
    s0 = _decay_before(g, base, head, left, 0, H, C, GATE)
    a00 = _invert(_block(k, beta, g, ids, base, head, left, 0, 0, s0, s0, G, H, K, BK, GATE))
    store_block(inverse, None, base, head, left, 0, 0, H, C, a00)
    if C >= 32:
        s1 = _decay_before(g, base, head, left, 1, H, C, GATE)
        a11 = _invert(_block(k, beta, g, ids, base, head, left, 1, 1, s1, s1, G, H, K, BK, GATE))
        store_block(inverse, None, base, head, left, 1, 1, H, C, a11)
        n = _block(k, beta, g, ids, base, head, left, 1, 0, s1, s0, G, H, K, BK, GATE)
        x0 = dot(n, a00)
        a10 = dot(a11, x0)
        store_block(inverse, None, base, head, left, 1, 0, H, C, a10)
    if C >= 64:
        s2 = _decay_before(g, base, head, left, 2, H, C, GATE)
        a22 = _invert(_block(k, beta, g, ids, base, head, left, 2, 2, s2, s2, G, H, K, BK, GATE))
        store_block(inverse, None, base, head, left, 2, 2, H, C, a22)
        n = _block(k, beta, g, ids, base, head, left, 2, 0, s2, s0, G, H, K, BK, GATE)
        x0 = dot(n, a00)
        n = _block(k, beta, g, ids, base, head, left, 2, 1, s2, s1, G, H, K, BK, GATE)
        x0 += dot(n, a10)
        x1 = dot(n, a11)
        a20 = dot(a22, x0)
        store_block(inverse, None, base, head, left, 2, 0, H, C, a20)
        a21 = dot(a22, x1)
        store_block(inverse, None, base, head, left, 2, 1, H, C, a21)
        s3 = _decay_before(g, base, head, left, 3, H, C, GATE)
        a33 = _invert(_block(k, beta, g, ids, base, head, left, 3, 3, s3, s3, G, H, K, BK, GATE))
        store_block(inverse, None, base, head, left, 3, 3, H, C, a33)
        n = _block(k, beta, g, ids, base, head, left, 3, 0, s3, s0, G, H, K, BK, GATE)
        x0 = dot(n, a00)
        n = _block(k, beta, g, ids, base, head, left, 3, 1, s3, s1, G, H, K, BK, GATE)
        x0 += dot(n, a10)
        x1 = dot(n, a11)
        n = _block(k, beta, g, ids, base, head, left, 3, 2, s3, s2, G, H, K, BK, GATE)
        x0 += dot(n, a20)
        x1 += dot(n, a21)
        x2 = dot(n, a22)
        a30 = dot(a33, x0)
        store_block(inverse, None, base, head, left, 3, 0, H, C, a30)
        a31 = dot(a33, x1)
        store_block(inverse, None, base, head, left, 3, 1, H, C, a31)
        a32 = dot(a33, x2)
        store_block(inverse, None, base, head, left, 3, 2, H, C, a32)


@triton.jit(do_not_specialize=["T"])
def transform_kernel(
    k, v, beta, g, ids, inverse, w, u, T, G: tl.constexpr, H: tl.constexpr, K: tl.constexpr,
    V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    """W = A (-beta k decayed from the chunk's start) `(B, T, H, K)` and U = A (beta v)
    `(B, T, H, V)` of one chunk and head."""
    program = tl.program_id(0).to(tl.int64)
    head, place = program % H, program // H
    chunks = tl.cdiv(T, C)
    row, start = place // chunks * T, place % chunks * C
    base, left = row + start, T - start
    index = tl.arange(0, C)
    live = index < left
    group = head // (H // G)
    factors = load_lower(inverse, base, head, left, H, C)
    betas = load_numbers(beta, base, head, index, left, H)
    for block in range(0, V, BV):
        values = block + tl.arange(0, BV)
        x = load_rows(v + (base * H + head) * V, index, H * V, live, values, V).to(tl.float32)
        x = dot(factors, narrow(x * betas[:, None], inverse.dtype.element_ty))
        x = narrow(x, u.dtype.element_ty)
        store_rows(u + (base * H + head) * V, index, H * V, live, values, V, x)
    enter, _, _ = head_factors(g, ids, row, start, head, T, H, C, GATE)
    enter = -betas * enter
    for block in range(0, K, BK):
        keys = block + tl.arange(0, BK)
        x = load_rows(k + (base * G + group) * K, index, G * K, live, keys, K).to(tl.float32)
        x = x * enter[:, None]
        if GATE == KEY:
            x = x * key_factors(g, base, head, left, keys, H, K, C, False)
        x = narrow(dot(factors, narrow(x, inverse.dtype.element_ty)), w.dtype.element_ty)
        store_rows(w + (base * H + head) * K, index, H * K, live, keys, K, x)
