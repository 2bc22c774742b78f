"""Triton kernels of the gated delta rule's gradients, all chunks at once; see `backward.py` for the
names. Readers of a chunk are its queries and its erase keys `-beta k`."""

from __future__ import annotations

import triton
import triton.language as tl

from rondo.kernels.delta_rule.triton_tiles import (
    HEAD,
    head_factors,
    load_lower,
    load_numbers,
    load_rows,
    pair_factors,
    store_rows,
)
from rondo.kernels.triton_support import dot, narrow


@triton.jit(do_not_specialize=["T"])
def pairs_kernel(
    v, beta, g, ids, inverse, written, do, dwritten, dvalues, dv, dp, dn, dbeta, scale, T,
    H: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BV: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    """Of one chunk and head: the gradients of beta v (`dvalues`) and v `(B, T, H, V)`, those of the
    products of readers with keys (`dp` for the queries, `dn`) `(B, T, H, C)` with a head's decay
    and the masks, and what beta v adds to the gradient of beta `(B, T, H)`."""
    program = tl.program_id(0).to(tl.int64)
    head, place = program % H, program // H
    chunks = tl.cdiv(T, C)
    row, start = place // chunks * T, place % chunks * C
    base, left = row + start, T - start
    index = tl.arange(0, C)
    live = index < left
    betas = load_numbers(beta, base, head, index, left, H)
    factors = tl.trans(load_lower(inverse, base, head, left, H, C))
    reads = tl.zeros((C, C), tl.float32)
    erases = tl.zeros((C, C), tl.float32)
    through_beta = tl.zeros((C,), tl.float32)
    at = (base * H + head) * V
    for block in range(0, V, BV):
        values = block + tl.arange(0, BV)
        x = dot(factors, load_rows(dwritten + at, index, H * V, live, values, V))
        vs = load_rows(v + at, index, H * V, live, values, V).to(tl.float32)
        through_beta += tl.sum(x * vs, 1)
        dvs = narrow(x * betas[:, None], dv.dtype.element_ty)
        store_rows(dv + at, index, H * V, live, values, V, dvs)
        x = narrow(x, dvalues.dtype.element_ty)
        store_rows(dvalues + at, index, H * V, live, values, V, x)
        new = tl.trans(load_rows(written + at, index, H * V, live, values, V))
        erases += dot(x, new)
        if do is not None:
            reads += dot(load_rows(do + at, index, H * V, live, values, V), new)
    pairs = pair_factors(g, ids, row, start, head, T, H, C, GATE)
    reads *= scale * pairs
    erases *= tl.where(index[:, None] > index[None, :], pairs, 0.0)
    tl.store(dbeta + base * H + head + index * H, through_beta, mask=live)
    at = (base * H + head) * C
    store_rows(dn + at, index, H * C, live, index, C, narrow(erases, dn.dtype.element_ty))
    if do is not None:
        store_rows(dp + at, index, H * C, live, index, C, narrow(reads, dp.dtype.element_ty))


@triton.jit(do_not_specialize=["B", "T"])
def readers_kernel(
    q, k, beta, g, ids, states, dstates, written, do, dvalues, dp, dn, dq, dk, dbeta, dg, scale,
    B, T, G: tl.constexpr, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    """Gradients of q and k, `(C, BK)` of one chunk and group, summed over its heads, and what these
    channels add to those of beta and the log decay of each head: `(K / BK, B, T, H)`."""
    program = tl.program_id(0).to(tl.int64)
    key_blocks, chunks = tl.cdiv(K, BK), tl.cdiv(T, C)
    key_block = program % key_blocks
    keys = key_block.to(tl.int32) * BK + tl.arange(0, BK)
    group = program // key_blocks % G
    place = program // (key_blocks * G)
    row, start = place // chunks * T, place % chunks * C
    base, left = row + start, T - start
    index = tl.arange(0, C)
    live = index < left
    ks = load_rows(k + (base * G + group) * K, index, G * K, live, keys, K)
    dqs = tl.zeros((C, BK), tl.float32)
    dks = tl.zeros((C, BK), tl.float32)
    for head in range(group * (H // G), (group + 1) * (H // G)):
        read = tl.zeros((C, BK), tl.float32)
        erased = tl.zeros((C, BK), tl.float32)
        kept = tl.zeros((C, BK), tl.float32)
        passing = 0.0
        at, tile = (base * H + head) * V, (place * H + head) * K * V
        for block in range(0, V, BV):
            values = block + tl.arange(0, BV)
            state = load_rows(states + tile, keys, V, keys < K, values, V)
            dstate = load_rows(dstates + tile, keys, V, keys < K, values, V)
            dvs = load_rows(dvalues + at, index, H * V, live, values, V)
            erased += dot(dvs, tl.trans(state))
            new = load_rows(written + at, index, H * V, live, values, V)
            kept += dot(new, tl.trans(dstate))
            if do is not None:
                dos = load_rows(do + at, index, H * V, live, values, V)
                read += dot(dos, tl.trans(state))
            if GATE == HEAD:
                crossing = state.to(tl.float32) * dstate.to(tl.float32)
                passing += tl.sum(tl.sum(crossing, 1), 0)
        enter, leave, through = head_factors(g, ids, row, start, head, T, H, C, GATE)
        betas = load_numbers(beta, base, head, index, left, H)
        erased *= enter[:, None]
        kept *= leave[:, None]
        read *= (scale * enter)[:, None]
        wide = ks.to(tl.float32)
        erasers = narrow(-betas[:, None] * wide, k.dtype.element_ty)
        products = load_lower(dn, base, head, left, H, C)
        erased += dot(products, ks)
        columns = dot(tl.trans(products), erasers)
        since = tl.sum(erased * erasers.to(tl.float32), 1)
        if do is not None:
            qs = load_rows(q + (base * G + group) * K, index, G * K, live, keys, K)
            products = load_lower(dp, base, head, left, H, C)
            read += dot(products, ks)
            columns += dot(tl.trans(products), qs)
            since += tl.sum(read * qs.to(tl.float32), 1)
        line = (key_block * B * T + base) * H + head + index * H
        if GATE == HEAD:
            # A pair i > j counts for every gate in between: in a sum from behind it is added once
            # as a row and, from j on, taken away once as a column.
            since -= tl.sum(columns * wide, 1)
            until = tl.sum(kept * wide, 1)
            before = index[None, :] < index[:, None]
            gate = tl.cumsum(since, 0, reverse=True) + passing * through
            gate += tl.sum(tl.where(before, until[None, :], 0.0), 1)
            tl.store(dg + line, gate, mask=live)
        tl.store(dbeta + line, -tl.sum(erased * wide, 1), mask=live)
        dqs += read
        dks += kept + columns - betas[:, None] * erased
    at = (base * G + group) * K
    store_rows(dk + at, index, G * K, live, keys, K, narrow(dks, dk.dtype.element_ty))
    if do is not None:
        store_rows(dq + at, index, G * K, live, keys, K, narrow(dqs, dq.dtype.element_ty))
