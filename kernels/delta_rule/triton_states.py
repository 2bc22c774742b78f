"""Triton kernels that carry the state of the gated delta rule from chunk to chunk."""

from __future__ import annotations

import triton
import triton.language as tl

from rondo.kernels.delta_rule.triton_tiles import (
    HEAD,
    KEY,
    head_factors,
    key_factors,
    key_through,
    load_rows,
    store_rows,
)
from rondo.kernels.triton_support import dot, narrow


@triton.jit(do_not_specialize=["T"])
def walk_kernel(
    q, k, w, g, ids, u, do, first, states, written, last, scale, T, G: tl.constexpr,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, GATE: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """The recurrence over the chunks of one row and head, for BV columns of the state S.

    Forward `V' = U + W S, S <- exp(G_C) S + (k to end)^T V'`. In reverse S is the gradient of the
    state, u the gradient of V' from the outputs of its own chunk (None for zero) and
    `dV' = u + (k to end) S, S <- exp(G_C) S + W^T dV' + scale * (q from start)^T do`. Stores S as
    each chunk meets it `(B, N, H, K, V)`, V' or dV' `(B, T, H, V)`, and S at the end
    `(B, H, K, V)`. S is held as tiles of BK rows, whose products stay small.

    Without first, states and written the walk is that of a summary: forward from zero, with K more
    columns that start as the identity and are not written to, and last `(B, H, K, V + K)`. There
    S and V' enter products as two numbers each, and so keep twice the digits.
    """
    program = tl.program_id(0).to(tl.int64)
    width: tl.constexpr = V + K if first is None else V
    value_blocks, chunks = tl.cdiv(width, BV), tl.cdiv(T, C)
    values = (program % value_blocks).to(tl.int32) * BV + tl.arange(0, BV)
    lane = program // value_blocks  # batch * H + head
    head, row = lane % H, lane // H * T
    group = head // (H // G)
    index = tl.arange(0, C)
    tiles: tl.constexpr = (K + BK - 1) // BK
    # Or a compiler loads what all of many float32 tiles need at once, and runs out of registers.
    APART: tl.constexpr = K > 128 and w.dtype.element_ty == tl.float32
    state = ()
    for i in tl.static_range(tiles):
        keys = tl.arange(0, BK) + i * BK
        if first is None:
            tile = tl.where(keys[:, None] + V == values[None, :], 1.0, 0.0)
        else:
            tile = load_rows(first + lane * K * V, keys, V, keys < K, values, V)
        state = state + (tile.to(tl.float32),)  # noqa: RUF005
    for step in range(chunks):
        chunk = step
        if REVERSE:
            chunk = chunks - 1 - step
        start = chunk * C
        base, left = row + start, T - start
        live = index < left
        k_at, w_at, v_at = (base * G + group) * K, (base * H + head) * K, (base * H + head) * V
        met_at = ((lane // H * chunks + chunk) * H + head) * K * V
        enter, leave, through = head_factors(g, ids, row, start, head, T, H, C, GATE)
        new = tl.zeros((C, BV), tl.float32)
        for i in tl.static_range(tiles):
            keys = tl.arange(0, BK) + i * BK
            met = narrow(state[i], w.dtype.element_ty)
            if states is not None:
                store_rows(states + met_at, keys, V, keys < K, values, V, met)
            if REVERSE:
                read = load_rows(k + k_at, index, G * K, live, keys, K)
                if GATE == KEY:
                    by_key = key_factors(g, base, head, left, keys, H, K, C, True)
                    read = narrow(read.to(tl.float32) * by_key, k.dtype.element_ty)
            else:
                read = load_rows(w + w_at, index, H * K, live, keys, K)
            new += dot(read, met)
            if first is None and w.dtype.element_ty != tl.float32:
                rest = state[i] - met.to(tl.float32)
                new += dot(read, narrow(rest, w.dtype.element_ty))
            if APART:
                tl.debug_barrier()
        if REVERSE:
            new *= leave[:, None]
        if u is not None:
            own = load_rows(u + v_at, index, H * V, live, values, V)
            new += own.to(tl.float32)
        if written is not None:
            kept = narrow(new, written.dtype.element_ty)
            store_rows(written + v_at, index, H * V, live, values, V, kept)
        if not REVERSE:
            new *= leave[:, None]
        kept = narrow(new, w.dtype.element_ty)
        after = ()
        for i in tl.static_range(tiles):
            keys = tl.arange(0, BK) + i * BK
            tile = state[i] * through
            if GATE == KEY:
                tile *= key_through(g, base, head, left, keys, H, K, C)[:, None]
            if REVERSE:
                write = load_rows(w + w_at, index, H * K, live, keys, K)
            else:
                write = load_rows(k + k_at, index, G * K, live, keys, K)
                if GATE == KEY:
                    by_key = key_factors(g, base, head, left, keys, H, K, C, True)
                    write = narrow(write.to(tl.float32) * by_key, k.dtype.element_ty)
            tile += dot(tl.trans(write), kept)
            if first is None and w.dtype.element_ty != tl.float32:
                rest = new - kept.to(tl.float32)
                tile += dot(tl.trans(write), narrow(rest, w.dtype.element_ty))
            if do is not None:
                write = load_rows(q + k_at, index, G * K, live, keys, K)
                if GATE == KEY:
                    by_key = key_factors(g, base, head, left, keys, H, K, C, False)
                    write = narrow(write.to(tl.float32) * by_key, k.dtype.element_ty)
                x = load_rows(do + v_at, index, H * V, live, values, V).to(tl.float32)
                x = narrow(x * (scale * enter)[:, None], k.dtype.element_ty)
                tile += dot(tl.trans(write), x)
            after = after + (tile,)  # noqa: RUF005
            if APART:
                tl.debug_barrier()
        state = after
    for i in tl.static_range(tiles):
        keys = tl.arange(0, BK) + i * BK
        store_rows(last + lane * K * width, keys, width, keys < K, values, width, state[i])


@triton.jit
def step_kernel(
    q, k, v, beta, g, first, o, last, scale, G: tl.constexpr, H: tl.constexpr, K: tl.constexpr,
    V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    """One position, T = 1: decays, corrects and reads BV columns of the state of a row and head."""
    program = tl.program_id(0).to(tl.int64)
    value_blocks = tl.cdiv(V, BV)
    values = (program % value_blocks).to(tl.int32) * BV + tl.arange(0, BV)
    lane = program // value_blocks
    group = lane // H * G + lane % H // (H // G)
    keys = tl.arange(0, BK)
    live, live_values = keys < K, values < V
    state = load_rows(first + lane * K * V, keys, V, live, values, V).to(tl.float32)
    if GATE == HEAD:
        state *= tl.exp(tl.load(g + lane).to(tl.float32))
    if GATE == KEY:
        steps = tl.load(g + lane * K + keys, mask=live, other=0.0).to(tl.float32)
        state *= tl.exp(steps)[:, None]
    key = tl.load(k + group * K + keys, mask=live, other=0.0).to(tl.float32)
    query = tl.load(q + group * K + keys, mask=live, other=0.0).to(tl.float32)
    value = tl.load(v + lane * V + values, mask=live_values, other=0.0).to(tl.float32)
    recalled = tl.sum(key[:, None] * state, 0)
    change = tl.load(beta + lane).to(tl.float32) * (value - recalled)
    state += key[:, None] * change[None, :]
    out = scale * tl.sum(query[:, None] * state, 0)
    tl.store(o + lane * V + values, narrow(out, o.dtype.element_ty), mask=live_values)
    store_rows(last + lane * K * V, keys, V, live, values, V, state)
