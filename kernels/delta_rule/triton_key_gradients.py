"""Triton kernels of the gradients through a decay of its own for every key channel: blocks of 16
positions as in `triton_keys.py`, names as in `triton_gradients.py`."""

from __future__ import annotations

import triton
import triton.language as tl

from rondo.kernels.delta_rule.triton_keys import behind, over, pick_row, within
from rondo.kernels.delta_rule.triton_tiles import (
    BLOCK,
    head_factors,
    key_steps,
    key_through,
    load_numbers,
    load_rows,
    store_rows,
)
from rondo.kernels.triton_support import dot, narrow


@triton.jit
def _readers_of(
    q, k, beta, g, base, head, left, A, keys, G: tl.constexpr, H: tl.constexpr, K: tl.constexpr
):
    """Queries and erase keys of block A, `(16, keys)` float32; q may be None."""
    rows = tl.arange(0, BLOCK) + A * BLOCK
    at = (base * G + head // (H // G)) * K
    erasers = load_rows(k + at, rows, G * K, rows < left, keys, K).to(tl.float32)
    erasers *= -load_numbers(beta, base, head, rows, left, H)[:, None]
    queries = erasers
    if q is not None:
        queries = load_rows(q + at, rows, G * K, rows < left, keys, K).to(tl.float32)
    return queries, erasers


@triton.jit
def _load_block(x, base, head, left, A, B, H: tl.constexpr, C: tl.constexpr):
    """Block (A, B) of x `(B, T, H, C)`, of which the part above the diagonal is 0."""
    index = tl.arange(0, BLOCK)
    rows, columns = index + A * BLOCK, index + B * BLOCK
    mask = (rows < left)[:, None] & (rows[:, None] >= columns[None, :])
    places = rows[:, None] * (H * C) + columns[None, :]
    return tl.load(x + (base * H + head) * C + places, mask=mask, other=0.0)


@triton.jit
def _as_readers(
    k, g, dp, dn, base, head, left, A, keys, G: tl.constexpr, H: tl.constexpr, K: tl.constexpr,
    C: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Gradients of the queries and erase keys of block A through the keys of earlier blocks."""
    index = tl.arange(0, BLOCK)
    at = (base * G + head // (H // G)) * K
    kind = k.dtype.element_ty
    read = tl.zeros((BLOCK, BK), tl.float32)
    erased = tl.zeros((BLOCK, BK), tl.float32)
    gap = tl.zeros((BK,), tl.float32)
    for step in range(A):
        B = A - 1 - step
        rows = index + B * BLOCK
        writers = load_rows(k + at, rows, G * K, rows < left, keys, K).to(tl.float32)
        until = behind(g, base, head, left, B, keys, H, K) + gap[None, :]
        writers = narrow(writers * tl.exp2(until), kind)
        erased += dot(_load_block(dn, base, head, left, A, B, H, C), writers)
        if dp is not None:
            read += dot(_load_block(dp, base, head, left, A, B, H, C), writers)
        gap += over(g, base, head, left, B, B + 1, keys, H, K)
    decay = tl.exp2(within(g, base, head, left, A, keys, H, K))
    return read * decay, erased * decay


@triton.jit
def _as_writers(
    q, k, beta, g, dp, dn, base, head, left, A, keys, G: tl.constexpr, H: tl.constexpr,
    K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Gradient of the keys of block A through the readers of later blocks."""
    kind = k.dtype.element_ty
    columns = tl.zeros((BLOCK, BK), tl.float32)
    gap = tl.zeros((BK,), tl.float32)
    for reader in range(A + 1, C // BLOCK):
        queries, erasers = _readers_of(q, k, beta, g, base, head, left, reader, keys, G, H, K)
        decay = tl.exp2(within(g, base, head, left, reader, keys, H, K) + gap[None, :])
        x = tl.trans(_load_block(dn, base, head, left, reader, A, H, C))
        columns += dot(x, narrow(erasers * decay, kind))
        if dp is not None:
            x = tl.trans(_load_block(dp, base, head, left, reader, A, H, C))
            columns += dot(x, narrow(queries * decay, kind))
        gap += over(g, base, head, left, reader, reader + 1, keys, H, K)
    return columns * tl.exp2(behind(g, base, head, left, A, keys, H, K))


@triton.jit
def _inside_gradients(
    k, g, dp, dn, queries, erasers, base, head, left, A, keys, G: tl.constexpr, H: tl.constexpr,
    K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Gradients of queries, erase keys and keys of block A through its own pairs j < i."""
    index = tl.arange(0, BLOCK)
    rows = index + A * BLOCK
    at = (base * G + head // (H // G)) * K
    writers = load_rows(k + at, rows, G * K, rows < left, keys, K).to(tl.float32)
    steps = key_steps(g, base, head, rows, rows < left, keys, H, K)
    erases = _load_block(dn, base, head, left, A, A, H, C).to(tl.float32)
    reads = erases
    if dp is not None:
        reads = _load_block(dp, base, head, left, A, A, H, C).to(tl.float32)
    read = tl.zeros((BLOCK, BK), tl.float32)
    erased = tl.zeros((BLOCK, BK), tl.float32)
    columns = tl.zeros((BLOCK, BK), tl.float32)
    since = tl.zeros((BLOCK, BK), tl.float32)
    for step in range(BLOCK):
        j = 15 - step
        writer = pick_row(writers, j)
        decay = tl.exp2(tl.where((index > j)[:, None], since, float("-inf")))
        erase = tl.sum(tl.where(index[None, :] == j, erases, 0.0), 1)[:, None] * decay
        erased += erase * writer[None, :]
        column = erase * erasers
        if dp is not None:
            one = tl.sum(tl.where(index[None, :] == j, reads, 0.0), 1)[:, None] * decay
            read += one * writer[None, :]
            column += one * queries
        columns += tl.where((index == j)[:, None], tl.sum(column, 0)[None, :], 0.0)
        since += tl.where((index >= j)[:, None], pick_row(steps, j)[None, :], 0.0)
    return read, erased, columns


@triton.jit
def _through_states(
    states, dstates, written, do, dvalues, at, tile, rows, left, keys, H: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Gradients of queries, erase keys and keys of a block through the states around its chunk,
    before any decay."""
    read = tl.zeros((BLOCK, BK), tl.float32)
    erased = tl.zeros((BLOCK, BK), tl.float32)
    kept = tl.zeros((BLOCK, BK), tl.float32)
    live = rows < left
    for block in range(0, V, BV):
        values = block + tl.arange(0, BV)
        state = tl.trans(load_rows(states + tile, keys, V, keys < K, values, V))
        dstate = tl.trans(load_rows(dstates + tile, keys, V, keys < K, values, V))
        erased += dot(load_rows(dvalues + at, rows, H * V, live, values, V), state)
        kept += dot(load_rows(written + at, rows, H * V, live, values, V), dstate)
        if do is not None:
            read += dot(load_rows(do + at, rows, H * V, live, values, V), state)
    return read, erased, kept


@triton.jit(do_not_specialize=["B", "T"])
def key_readers_kernel(
    q, k, beta, g, ids, states, dstates, written, do, dvalues, dp, dn, dq, dk, dbeta, since, until,
    scale, B, T, G: tl.constexpr, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """As `readers_kernel`, for a block of 16 positions of one chunk and group. What the decays get
    lies in `since` and `until` `(B, T, H, K)`: `key_gate_kernel` adds it up."""
    program = tl.program_id(0).to(tl.int64)
    blocks: tl.constexpr = C // BLOCK
    key_blocks, chunks = tl.cdiv(K, BK), tl.cdiv(T, C)
    A = (program % blocks).to(tl.int32)
    key_block = program // blocks % key_blocks
    keys = key_block.to(tl.int32) * BK + tl.arange(0, BK)
    group = program // (blocks * key_blocks) % G
    place = program // (blocks * key_blocks * G)
    row, start = place // chunks * T, place % chunks * C
    base, left = row + start, T - start
    rows = tl.arange(0, BLOCK) + A * BLOCK
    live = rows < left
    ks = load_rows(k + (base * G + group) * K, rows, G * K, live, keys, K).to(tl.float32)
    enter = tl.full((BLOCK,), 1.0, tl.float32)
    leave = tl.full((BLOCK,), 1.0, tl.float32)
    if ids is not None:
        mine = tl.load(ids + base + rows, mask=live, other=0)
        before = tl.load(ids + row + tl.maximum(start - 1, 0))
        enter = tl.where(mine == before, 1.0, 0.0)
        leave = tl.where(mine == tl.load(ids + row + tl.minimum(start + C, T) - 1), 1.0, 0.0)
    dqs = tl.zeros((BLOCK, BK), tl.float32)
    dks = tl.zeros((BLOCK, BK), tl.float32)
    for head in range(group * (H // G), (group + 1) * (H // G)):
        read, erased, kept = _through_states(
            states, dstates, written, do, dvalues, (base * H + head) * V,
            (place * H + head) * K * V, rows, left, keys, H, K, V, BK, BV,
        )  # fmt: skip
        sums = within(g, base, head, left, A, keys, H, K)
        sums += over(g, base, head, left, 0, A, keys, H, K)[None, :]
        erased *= enter[:, None] * tl.exp2(sums)
        read *= scale * enter[:, None] * tl.exp2(sums)
        sums = behind(g, base, head, left, A, keys, H, K)
        sums += over(g, base, head, left, A + 1, blocks, keys, H, K)[None, :]
        kept *= leave[:, None] * tl.exp2(sums)
        queries, erasers = _readers_of(q, k, beta, g, base, head, left, A, keys, G, H, K)
        x, y = _as_readers(k, g, dp, dn, base, head, left, A, keys, G, H, K, C, BK)
        columns = _as_writers(q, k, beta, g, dp, dn, base, head, left, A, keys, G, H, K, C, BK)
        read += x
        erased += y
        x, y, z = _inside_gradients(
            k, g, dp, dn, queries, erasers, base, head, left, A, keys, G, H, K, C, BK
        )
        read += x
        erased += y
        columns += z
        gate = erased * erasers - columns * ks
        if do is not None:
            gate += read * queries
        at = (base * H + head) * K
        store_rows(since + at, rows, H * K, live, keys, K, gate)
        store_rows(until + at, rows, H * K, live, keys, K, kept * ks)
        betas = load_numbers(beta, base, head, rows, left, H)
        line = (key_block * B * T + base) * H + head + rows * H
        tl.store(dbeta + line, -tl.sum(erased * ks, 1), mask=live)
        dks += kept + columns - betas[:, None] * erased
        if do is not None:
            # A position's own pair crosses no decay.
            pairs = _load_block(dp, base, head, left, A, A, H, C).to(tl.float32)
            own = tl.sum(tl.where(rows[:, None] == rows[None, :], pairs, 0.0), 1)[:, None]
            dqs += read + own * ks
            dks += own * queries
    at = (base * G + group) * K
    store_rows(dk + at, rows, G * K, live, keys, K, narrow(dks, dk.dtype.element_ty))
    if do is not None:
        store_rows(dq + at, rows, G * K, live, keys, K, narrow(dqs, dq.dtype.element_ty))


@triton.jit(do_not_specialize=["T"])
def key_gate_kernel(
    g, ids, states, dstates, since, until, dg, T, H: tl.constexpr, K: tl.constexpr,
    V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    """Gradient of the log decays `(C, BK)` of one chunk and head: a position's decay lies before
    every later reader, behind every earlier writer, and between the states."""
    program = tl.program_id(0).to(tl.int64)
    key_blocks, chunks = tl.cdiv(K, BK), tl.cdiv(T, C)
    keys = (program % key_blocks).to(tl.int32) * BK + tl.arange(0, BK)
    head = program // key_blocks % H
    place = program // (key_blocks * H)
    row, start = place // chunks * T, place % chunks * C
    base, left = row + start, T - start
    index = tl.arange(0, C)
    live = index < left
    tile = (place * H + head) * K * V
    passing = tl.zeros((BK,), tl.float32)
    for block in range(0, V, BV):
        values = block + tl.arange(0, BV)
        state = load_rows(states + tile, keys, V, keys < K, values, V).to(tl.float32)
        dstate = load_rows(dstates + tile, keys, V, keys < K, values, V).to(tl.float32)
        passing += tl.sum(state * dstate, 1)
    _, _, through = head_factors(g, ids, row, start, head, T, H, C, GATE)
    passing *= key_through(g, base, head, left, keys, H, K, C) * through
    at = (base * H + head) * K
    gate = tl.cumsum(load_rows(since + at, index, H * K, live, keys, K), 0, reverse=True)
    earlier = index - 1
    written = load_rows(until + at, earlier, H * K, (earlier >= 0) & live, keys, K)
    gate += tl.cumsum(written, 0) + passing[None, :]
    store_rows(dg + at, index, H * K, live, keys, K, gate)
