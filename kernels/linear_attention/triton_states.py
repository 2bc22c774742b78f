"""Triton kernels that carry the state of gated linear attention from chunk to chunk."""

from __future__ import annotations

import triton
import triton.language as tl

from rondo.kernels.linear_attention.triton_tiles import (
    HEAD,
    KEY,
    key_factors,
    load_rows,
    row_factors,
    stays_open,
    store_rows,
)
from rondo.kernels.triton_support import dot, narrow


@triton.jit(do_not_specialize=["T"])
def walk_kernel(
    x,
    y,
    g,
    ids,
    first,
    met,
    last,
    reach,
    scale,
    T,
    G: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    GATE: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """`S <- decay of the chunk * S + scale * (decayed x)^T y` over the chunks of one row and head,
    for a tile `(BK, BV)` of S. Forward, x and y are k and v, decayed to the chunk's end; in
    reverse they are q and the gradient of o, decayed from its start, and S is the gradient of the
    state; without x nothing is added. Stores S as each chunk meets it, and as it is at the end; and
    as reach `(B, N + 1, H, 1 or K)` what the walk leaves by then of a state that it starts from.

    x `(B, T, G, K)`, y `(B, T, H, V)`, first and last `(B, H, K, V)`, met `(B, N, H, K, V)`.
    """
    program = tl.program_id(0).to(tl.int64)
    value_blocks, key_blocks = tl.cdiv(V, BV), tl.cdiv(K, BK)
    values = (program % value_blocks).to(tl.int32) * BV + tl.arange(0, BV)
    keys = (program // value_blocks % key_blocks).to(tl.int32) * BK + tl.arange(0, BK)
    lane = program // (value_blocks * key_blocks)  # batch * H + head
    head, row = lane % H, lane // H * T
    group = head // (H // G)
    chunks = tl.cdiv(T, C)
    live_keys = keys < K
    index = tl.arange(0, C)
    state = tl.zeros((BK, BV), tl.float32)
    if first is not None:
        state = load_rows(first + lane * K * V, keys, V, live_keys, values, V).to(tl.float32)
    left = tl.full((BK,), 1.0, tl.float32)
    width: tl.constexpr = K if GATE == KEY else 1
    writes = keys < tl.where(program % value_blocks == 0, width, 0)
    for step in range(chunks):
        chunk = step
        if REVERSE:
            chunk = chunks - 1 - step
        start = chunk * C
        if met is not None:
            place = (lane // H * chunks + chunk) * H + head
            store_rows(met + place * K * V, keys, V, live_keys, values, V, state)
        if reach is not None:
            place = (lane // H * (chunks + 1) + chunk) * H + head
            tl.store(reach + place * width + keys, left, mask=writes)
        live, base = index < T - start, row + start
        if GATE == KEY:
            steps = load_rows(g + (base * H + head) * K, index, H * K, live, keys, K)
            through = tl.exp(tl.sum(steps.to(tl.float32), 0))
            state = state * through[:, None]
            left = left * through
        elif GATE == HEAD:
            steps = tl.load(g + base * H + head + index * H, mask=live, other=0.0)
            through = tl.exp(tl.sum(steps.to(tl.float32), 0))
            state = state * through
            left = left * through
        if ids is not None:
            goes_on = stays_open(ids, row, start, T, C)
            state = tl.where(goes_on, state, 0.0)
            left = tl.where(goes_on, left, 0.0)
        if x is not None:
            xs = load_rows(x + (base * G + group) * K, index, G * K, live, keys, K)
            ys = load_rows(y + (base * H + head) * V, index, H * V, live, values, V)
            factors = row_factors(g, ids, row, start, head, T, H, C, GATE, not REVERSE) * scale
            if GATE == KEY:
                by_key = key_factors(g, row, start, head, keys, T, H, K, C, not REVERSE)
                xs = narrow(xs.to(tl.float32) * by_key * factors[:, None], x.dtype.element_ty)
            else:
                ys = narrow(ys.to(tl.float32) * factors[:, None], y.dtype.element_ty)
            state += dot(tl.trans(xs), ys)
    store_rows(last + lane * K * V, keys, V, live_keys, values, V, state)
    if reach is not None:
        place = (lane // H * (chunks + 1) + chunks) * H + head
        tl.store(reach + place * width + keys, left, mask=writes)


@triton.jit
def step_kernel(
    q,
    k,
    v,
    g,
    first,
    o,
    last,
    scale,
    G: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    GATE: tl.constexpr,
):
    """One position, T = 1: updates `(K, BV)` of the state of one row and head and reads it."""
    program = tl.program_id(0).to(tl.int64)
    value_blocks = tl.cdiv(V, BV)
    values = (program % value_blocks).to(tl.int32) * BV + tl.arange(0, BV)
    lane = program // value_blocks
    group = lane // H * G + lane % H // (H // G)
    written = tl.load(v + lane * V + values, mask=values < V, other=0.0).to(tl.float32)
    out = tl.zeros((BV,), tl.float32)
    for block in range(0, K, BK):
        keys = block + tl.arange(0, BK)
        live = keys < K
        key = tl.load(k + group * K + keys, mask=live, other=0.0).to(tl.float32)
        query = tl.load(q + group * K + keys, mask=live, other=0.0).to(tl.float32)
        state = key[:, None] * written[None, :]
        if first is not None:
            before = load_rows(first + lane * K * V, keys, V, live, values, V).to(tl.float32)
            if GATE == KEY:
                steps = tl.load(g + lane * K + keys, mask=live, other=0.0).to(tl.float32)
                before = before * tl.exp(steps)[:, None]
            elif GATE == HEAD:
                before = before * tl.exp(tl.load(g + lane).to(tl.float32))
            state += before
        store_rows(last + lane * K * V, keys, V, live, values, V, state)
        out += tl.sum(query[:, None] * state, 0)
    tl.store(o + lane * V + values, narrow(out * scale, o.dtype.element_ty), mask=values < V)
