"""Triton kernels for one decay a key channel: the scores of each chunk, and the gate's gradient.

A chunk is cut into blocks of 16 positions. A block of rows meets an earlier block of columns at the
point where the rows' block starts, so that both factors of a matrix product are at most 1
(arXiv 2312.06635); a block meets itself one row after another, by a running product of decays.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rondo.kernels.linear_attention.triton_tiles import (
    KEY,
    load_rows,
    load_states,
    stays_open,
    store_rows,
    sums_inside,
)
from rondo.kernels.triton_support import dot, narrow


@triton.jit(do_not_specialize=["T"])
def key_scores_kernel(
    q,
    k,
    g,
    ids,
    scores,
    scale,
    T,
    G: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    C: tl.constexpr,
    BC: tl.constexpr,
    BK: tl.constexpr,
):
    """`scale * sum_k q_ik k_jk exp(G_ik - G_jk)` for j <= i of one document, else 0, as scores
    `(B, T, H, C)`: BC rows of one chunk and head, all K <= BK channels at once."""
    program = tl.program_id(0).to(tl.int64)
    chunks, blocks = tl.cdiv(T, C), C // BC
    block = (program % blocks).to(tl.int32)
    head = program // blocks % H
    place = program // (blocks * H)
    row, start = place // chunks * T, place % chunks * C
    group = head // (H // G)
    index, keys = tl.arange(0, BC), tl.arange(0, BK)
    first = row + start + block * BC  # of the rows
    left = T - start - block * BC
    live = index < left
    g += (first * H + head) * K
    k += (first * G + group) * K
    q += (first * G + group) * K
    scores += (first * H + head) * C
    if ids is not None:
        mine = tl.load(ids + first + index, mask=live, other=0)
    rows = load_rows(q, index, G * K, live, keys, K).to(tl.float32)
    rows = narrow(rows * tl.exp(sums_inside(g, left, keys, H, K, BC, False)), q.dtype.element_ty)
    between = tl.zeros((BK,), tl.float32)
    for step in range(1, block + 1):
        back, inside = step * BC, index < left + step * BC
        columns = load_rows(k - back * G * K, index, G * K, inside, keys, K).to(tl.float32)
        earlier = g - back * H * K
        columns *= tl.exp(
            sums_inside(earlier, left + back, keys, H, K, BC, True) + between[None, :]
        )
        steps = load_rows(earlier, index, H * K, inside, keys, K)
        between += tl.sum(steps.to(tl.float32), 0)
        tile = scale * dot(rows, tl.trans(narrow(columns, k.dtype.element_ty)))
        if ids is not None:
            other = tl.load(ids + first - back + index, mask=inside, other=0)
            tile = tl.where(mine[:, None] == other[None, :], tile, 0.0)
        tile = narrow(tile, scores.dtype.element_ty)
        store_rows(scores + (block - step) * BC, index, H * C, live, index, BC, tile)
    ks = load_rows(k, index, G * K, live, keys, K).to(tl.float32)
    decay = tl.zeros((BC, BK), tl.float32)
    for i in range(BC):
        inside = keys < tl.where(i < left, K, 0)
        steps = tl.load(g + i * H * K + keys, mask=inside, other=0.0).to(tl.float32)
        query = tl.load(q + i * G * K + keys, mask=inside, other=0.0).to(tl.float32)
        decay = tl.where((index == i)[:, None], 1.0, decay * tl.exp(steps)[None, :])
        line = scale * tl.sum(ks * decay * query[None, :], 1)
        if ids is not None:
            own = tl.load(ids + first + i, mask=i < left, other=0)
            line = tl.where(mine == own, line, 0.0)
        line = narrow(line, scores.dtype.element_ty)
        tl.store(
            scores + i * H * C + block * BC + index, line, mask=index < tl.where(i < left, BC, 0)
        )
    nothing = tl.zeros((BC, BC), scores.dtype.element_ty)
    for later in range(block + 1, blocks):
        store_rows(scores + later * BC, index, H * C, live, index, BC, nothing)


@triton.jit(do_not_specialize=["T"])
def gate_sums_kernel(
    reads,
    writes,
    states,
    dstates,
    last,
    reach,
    g,
    ids,
    dg,
    T,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    """Gradient of the log decay of each position: what is read at it or later, what was written
    before it, and what passes the whole chunk. All `(B, T, H, K)`; dstates, last and reach: see
    `load_states`."""
    program = tl.program_id(0).to(tl.int64)
    key_blocks, chunks = tl.cdiv(K, BK), tl.cdiv(T, C)
    keys = (program % key_blocks).to(tl.int32) * BK + tl.arange(0, BK)
    head = program // key_blocks % H
    place = program // (key_blocks * H)
    row, start = place // chunks * T, place % chunks * C
    index = tl.arange(0, C)
    live = index < T - start
    passing = tl.zeros((BK,), tl.float32)
    tile = (place * H + head) * K * V
    for block in range(0, V, BV):
        values = block + tl.arange(0, BV)
        state = load_rows(states + tile, keys, V, keys < K, values, V)
        dstate = load_states(dstates, last, reach, place, head, chunks, keys, values, H, K, V, KEY)
        passing += tl.sum(state * dstate, 1)
    base = ((row + start) * H + head) * K
    steps = load_rows(g + base, index, H * K, live, keys, K).to(tl.float32)
    passing *= tl.exp(tl.sum(steps, 0))
    if ids is not None:
        passing = tl.where(stays_open(ids, row, start, T, C), passing, 0.0)
    read = load_rows(reads + base, index, H * K, live, keys, K)
    written = load_rows(writes + base, index - 1, H * K, live & (index > 0), keys, K)
    gradient = tl.cumsum(read, 0, reverse=True) + tl.cumsum(written, 0) + passing[None, :]
    store_rows(dg + base, index, H * K, live, keys, K, narrow(gradient, dg.dtype.element_ty))
