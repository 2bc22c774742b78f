"""Triton kernels of gated linear attention that treat all chunks at once: outputs and gradients
through the decays of a head, given the states between chunks."""

from __future__ import annotations

import triton
import triton.language as tl

from rondo.kernels.linear_attention.triton_tiles import (
    HEAD,
    KEY,
    key_factors,
    load_rows,
    load_states,
    pair_factors,
    row_factors,
    stays_open,
    store_rows,
    sums_before,
)
from rondo.kernels.triton_support import dot, narrow


@triton.jit(do_not_specialize=["T"])
def mix_kernel(
    x,
    y,
    z,
    states,
    first,
    reach,
    scores,
    g,
    ids,
    out,
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
    """`scale * ((decayed x) S + P z)` for one chunk and a tile `(C, BV)`: o from x, y, z = q, k, v
    and the states before chunks. In reverse `(decayed x) S + scale * P^T z`: the gradient of v from
    k, q, the gradient of o and the gradients of the states after chunks. Without z, P z is 0.
    States, first and reach: see `load_states`.

    With a decay a key channel P is given, scaled, as scores `(B, T, H, C)`; otherwise it is made
    from x and y.
    """
    program = tl.program_id(0).to(tl.int64)
    value_blocks, chunks = tl.cdiv(V, BV), tl.cdiv(T, C)
    values = (program % value_blocks).to(tl.int32) * BV + tl.arange(0, BV)
    head = program // value_blocks % H
    place = program // (value_blocks * H)  # batch * chunks + chunk
    row, start = place // chunks * T, place % chunks * C
    base = row + start
    group = head // (H // G)
    index = tl.arange(0, C)
    live = index < T - start
    inter = tl.zeros((C, BV), tl.float32)
    weights = tl.zeros((C, C), tl.float32)
    for block in range(0, K, BK):
        keys = block + tl.arange(0, BK)
        xs = load_rows(x + (base * G + group) * K, index, G * K, live, keys, K)
        state = load_states(states, first, reach, place, head, chunks, keys, values, H, K, V, GATE)
        state = narrow(state, x.dtype.element_ty)
        if GATE == KEY:
            by_key = key_factors(g, row, start, head, keys, T, H, K, C, REVERSE)
            xs = narrow(xs.to(tl.float32) * by_key, x.dtype.element_ty)
        elif z is not None:
            ys = load_rows(y + (base * G + group) * K, index, G * K, live, keys, K)
            weights += dot(xs, tl.trans(ys))
        inter += dot(xs, state)
    inter *= row_factors(g, ids, row, start, head, T, H, C, GATE, REVERSE)[:, None]
    if not REVERSE:
        inter *= scale
    if z is not None:
        if GATE == KEY:
            places, mask = index[:, None] * (H * C) + index[None, :], live[:, None]
            if REVERSE:
                places, mask = index[None, :] * (H * C) + index[:, None], live[None, :]
            scores += (base * H + head) * C
            weights = tl.load(scores + places, mask=mask, other=0.0)
        else:
            weights *= scale * pair_factors(g, ids, row, start, head, T, H, C, GATE, REVERSE)
            weights = narrow(weights, z.dtype.element_ty)
        zs = load_rows(z + (base * H + head) * V, index, H * V, live, values, V)
        inter += dot(weights, zs)
    inter = narrow(inter, out.dtype.element_ty)
    store_rows(out + (base * H + head) * V, index, H * V, live, values, V, inter)


@triton.jit(do_not_specialize=["T"])
def score_gradients_kernel(
    v,
    do,
    g,
    ids,
    dscores,
    scale,
    T,
    H: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BV: tl.constexpr,
    GATE: tl.constexpr,
):
    """`scale * (do v^T) * decay` below the diagonal and 0 elsewhere, `(B, T, H, C)`: what the
    products of q and k in each chunk get for a gradient. A decay a key channel is left out."""
    program = tl.program_id(0).to(tl.int64)
    chunks = tl.cdiv(T, C)
    head, place = program % H, program // H
    row, start = place // chunks * T, place % chunks * C
    base = row + start
    index = tl.arange(0, C)
    live = index < T - start
    scores = tl.zeros((C, C), tl.float32)
    for block in range(0, V, BV):
        values = block + tl.arange(0, BV)
        vs = load_rows(v + (base * H + head) * V, index, H * V, live, values, V)
        dos = load_rows(do + (base * H + head) * V, index, H * V, live, values, V)
        scores += dot(dos, tl.trans(vs))
    scores *= scale * pair_factors(g, ids, row, start, head, T, H, C, GATE, False)
    scores = tl.where(index[:, None] == index[None, :], 0.0, scores)
    scores = narrow(scores, dscores.dtype.element_ty)
    store_rows(dscores + (base * H + head) * C, index, H * C, live, index, C, scores)


@triton.jit(do_not_specialize=["B", "T"])
def gradients_kernel(
    q,
    k,
    v,
    do,
    dscores,
    states,
    dstates,
    first,
    reach,
    g,
    ids,
    dq,
    dk,
    dg,
    scale,
    B,
    T,
    G: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    GATE: tl.constexpr,
):
    """Gradients of q and k, `(C, BK)` of one chunk and group summed over its heads, and of the
    log decay of each head: dg `(K / BK, B, T, H)`, the part of these key channels. Without do only
    what comes through the state after the row; q, dq and dscores are not used. Dstates, first and
    reach: see `load_states`."""
    program = tl.program_id(0).to(tl.int64)
    key_blocks, chunks = tl.cdiv(K, BK), tl.cdiv(T, C)
    key_block = program % key_blocks
    keys = key_block.to(tl.int32) * BK + tl.arange(0, BK)
    group = program // key_blocks % G
    place = program // (key_blocks * G)
    row, start = place // chunks * T, place % chunks * C
    base = row + start
    index = tl.arange(0, C)
    live, live_keys = index < T - start, keys < K
    ks = load_rows(k + (base * G + group) * K, index, G * K, live, keys, K)
    dqs = tl.zeros((C, BK), tl.float32)
    dks = tl.zeros((C, BK), tl.float32)
    if do is not None:
        qs = load_rows(q + (base * G + group) * K, index, G * K, live, keys, K)
    for head in tl.range(group * (H // G), (group + 1) * (H // G), disable_licm=True):
        read = tl.zeros((C, BK), tl.float32)
        written = tl.zeros((C, BK), tl.float32)
        itself = tl.zeros((C,), tl.float32)
        passing = 0.0
        for block in range(0, V, BV):
            values = block + tl.arange(0, BV)
            vs = load_rows(v + (base * H + head) * V, index, H * V, live, values, V)
            tile = (place * H + head) * K * V
            dstate = load_states(
                dstates, first, reach, place, head, chunks, keys, values, H, K, V, GATE
            )
            written += dot(vs, tl.trans(narrow(dstate, k.dtype.element_ty)))
            if GATE == HEAD or do is not None:
                state = load_rows(states + tile, keys, V, live_keys, values, V)
            if GATE == HEAD:
                passing += tl.sum(tl.sum(state * dstate, 1), 0)
            if do is not None:
                dos = load_rows(do + (base * H + head) * V, index, H * V, live, values, V)
                itself += tl.sum(dos.to(tl.float32) * vs.to(tl.float32), 1)
                read += dot(dos, tl.trans(narrow(state, k.dtype.element_ty)))
        written *= row_factors(g, ids, row, start, head, T, H, C, GATE, True)[:, None]
        crossed = tl.sum(ks.to(tl.float32) * written, 1)
        crossing = tl.zeros((C,), tl.float32)
        if do is not None:
            read *= (scale * row_factors(g, ids, row, start, head, T, H, C, GATE, False))[:, None]
            scores = load_rows(dscores + (base * H + head) * C, index, H * C, live, index, C)
            column = dot(tl.trans(scores), qs)
            read += dot(scores, ks)
            if GATE == HEAD:
                crossing = tl.sum(qs.to(tl.float32) * read - ks.to(tl.float32) * column, 1)
            # A position paired with itself crosses no decay: the gate does not see it.
            itself = (scale * itself)[:, None]
            dqs += read + itself * ks.to(tl.float32)
            dks += column + itself * qs.to(tl.float32)
        dks += written
        if GATE == HEAD:
            steps = tl.load(g + base * H + head + index * H, mask=live, other=0.0)
            through = tl.exp(tl.sum(steps.to(tl.float32), 0))
            if ids is not None:
                through = tl.where(stays_open(ids, row, start, T, C), through, 0.0)
            gradient = tl.cumsum(crossing, 0, reverse=True) + passing * through
            gradient += sums_before(crossed)
            line = (key_block * B * T + base) * H + head
            tl.store(dg + line + index * H, gradient, mask=live)
    dks = narrow(dks, k.dtype.element_ty)
    store_rows(dk + (base * G + group) * K, index, G * K, live, keys, K, dks)
    if do is not None:
        dqs = narrow(dqs, k.dtype.element_ty)
        store_rows(dq + (base * G + group) * K, index, G * K, live, keys, K, dqs)
