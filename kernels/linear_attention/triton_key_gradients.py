"""Triton kernel for one decay a key channel: gradients of q and k, and the parts of the gate's."""

from __future__ import annotations

import triton
import triton.language as tl

from rondo.kernels.linear_attention.triton_tiles import (
    KEY,
    load_rows,
    load_states,
    store_rows,
    sums_inside,
)
from rondo.kernels.triton_support import dot, narrow


@triton.jit
def _within_block(
    q,
    dscores,
    g,
    ks,
    left,
    keys,
    H: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    C: tl.constexpr,
    BC: tl.constexpr,
    BK: tl.constexpr,
):
    """Gradients `(BC, BK)` of q and k from the pairs of one block; pointers are at its start."""
    index = tl.arange(0, BC)
    decay = tl.zeros((BC, BK), tl.float32)
    dqs = tl.zeros((BC, BK), tl.float32)
    dks = tl.zeros((BC, BK), tl.float32)
    for i in range(BC):
        inside = keys < tl.where(i < left, K, 0)
        steps = tl.load(g + i * H * K + keys, mask=inside, other=0.0).to(tl.float32)
        query = tl.load(q + i * G * K + keys, mask=inside, other=0.0).to(tl.float32)
        line = tl.load(
            dscores + i * H * C + index, mask=index < tl.where(i < left, BC, 0), other=0.0
        )
        decay = tl.where((index == i)[:, None], 1.0, decay * tl.exp(steps)[None, :])
        weights = line.to(tl.float32)[:, None] * decay
        dqs = tl.where((index == i)[:, None], tl.sum(weights * ks, 0)[None, :], dqs)
        dks += weights * query[None, :]
    return dqs, dks


@triton.jit(do_not_specialize=["T"])
def key_gradients_kernel(
    q,
    k,
    v,
    do,
    dscores,
    states,
    dstates,
    last,
    reach,
    g,
    ids,
    dq,
    dk,
    reads,
    writes,
    scale,
    T,
    G: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BC: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    """Gradients of q and k, `(BC, BK)` of one block of a chunk and group, summed over its heads;
    and of each head what is read at a position, less what is read of it, and what it writes to the
    state, both times its gradient, as reads and writes `(B, T, H, K)`. Dstates, last and reach: see
    `load_states`."""
    program = tl.program_id(0).to(tl.int64)
    key_blocks, chunks, blocks = tl.cdiv(K, BK), tl.cdiv(T, C), C // BC
    keys = (program % key_blocks).to(tl.int32) * BK + tl.arange(0, BK)
    block = (program // key_blocks % blocks).to(tl.int32)
    group = program // (key_blocks * blocks) % G
    place = program // (key_blocks * blocks * G)
    row, start = place // chunks * T, place % chunks * C
    index, live_keys = tl.arange(0, BC), keys < K
    first = row + start + block * BC
    left = T - start - block * BC
    live = index < left
    q += (first * G + group) * K
    k += (first * G + group) * K
    ks = load_rows(k, index, G * K, live, keys, K).to(tl.float32)
    total_q = tl.zeros((BC, BK), tl.float32)
    total_k = tl.zeros((BC, BK), tl.float32)
    for head in tl.range(group * (H // G), (group + 1) * (H // G), disable_licm=True):
        gates = g + (first * H + head) * K
        pairs = dscores + (first * H + head) * C
        # Columns of earlier blocks, met where this block starts.
        dqs = tl.zeros((BC, BK), tl.float32)
        before = tl.zeros((BK,), tl.float32)
        for step in range(1, block + 1):
            back, inside = step * BC, index < left + step * BC
            columns = load_rows(k - back * G * K, index, G * K, inside, keys, K).to(tl.float32)
            other = gates - back * H * K
            columns *= tl.exp(
                sums_inside(other, left + back, keys, H, K, BC, True) + before[None, :]
            )
            steps = load_rows(other, index, H * K, inside, keys, K)
            before += tl.sum(steps.to(tl.float32), 0)
            tile = load_rows(pairs + (block - step) * BC, index, H * C, live, index, BC)
            dqs += dot(tile, narrow(columns, k.dtype.element_ty))
        # Rows of later blocks, met where this block ends.
        dks = tl.zeros((BC, BK), tl.float32)
        after = tl.zeros((BK,), tl.float32)
        for step in range(1, blocks - block):
            on, inside = step * BC, index < left - step * BC
            rows = load_rows(q + on * G * K, index, G * K, inside, keys, K).to(tl.float32)
            other = gates + on * H * K
            from_start = sums_inside(other, left - on, keys, H, K, BC, False)
            rows *= tl.exp(from_start + after[None, :])
            steps = load_rows(other, index, H * K, inside, keys, K)
            after += tl.sum(steps.to(tl.float32), 0)
            tile = load_rows(pairs + on * H * C + block * BC, index, H * C, inside, index, BC)
            dks += dot(tl.trans(tile), narrow(rows, q.dtype.element_ty))
        read = tl.zeros((BC, BK), tl.float32)
        written = tl.zeros((BC, BK), tl.float32)
        itself = tl.zeros((BC,), tl.float32)
        for column in range(0, V, BV):
            values = column + tl.arange(0, BV)
            vs = load_rows(v + (first * H + head) * V, index, H * V, live, values, V)
            dos = load_rows(do + (first * H + head) * V, index, H * V, live, values, V)
            lines = (place * H + head) * K * V
            state = load_rows(states + lines, keys, V, live_keys, values, V)
            dstate = load_states(
                dstates, last, reach, place, head, chunks, keys, values, H, K, V, KEY
            )
            read += dot(dos, tl.trans(narrow(state, k.dtype.element_ty)))
            written += dot(vs, tl.trans(narrow(dstate, k.dtype.element_ty)))
            itself += tl.sum(dos.to(tl.float32) * vs.to(tl.float32), 1)
        if ids is not None:
            mine = tl.load(ids + first + index, mask=live, other=0)
            entered = mine == tl.load(ids + row + tl.maximum(start - 1, 0))
            leaves = mine == tl.load(ids + row + tl.minimum(start + C, T) - 1)
            read = tl.where(entered[:, None], read, 0.0)
            written = tl.where(leaves[:, None], written, 0.0)
        enter = sums_inside(gates, left, keys, H, K, BC, False)
        leave = sums_inside(gates, left, keys, H, K, BC, True)
        dqs = dqs * tl.exp(enter) + scale * read * tl.exp(enter + before[None, :])
        dks *= tl.exp(leave)
        written *= tl.exp(leave + after[None, :])
        inner_q, inner_k = _within_block(
            q, pairs + block * BC, gates, ks, left, keys, H, G, K, C, BC, BK
        )
        dqs += inner_q
        dks += inner_k
        qs = load_rows(q, index, G * K, live, keys, K).to(tl.float32)
        lines = (first * H + head) * K
        store_rows(reads + lines, index, H * K, live, keys, K, qs * dqs - ks * dks)
        store_rows(writes + lines, index, H * K, live, keys, K, ks * written)
        # A position paired with itself crosses no decay: the gate does not see it.
        itself = (scale * itself)[:, None]
        total_q += dqs + itself * ks
        total_k += dks + written + itself * qs
    total_q, total_k = narrow(total_q, q.dtype.element_ty), narrow(total_k, k.dtype.element_ty)
    store_rows(dq + (first * G + group) * K, index, G * K, live, keys, K, total_q)
    store_rows(dk + (first * G + group) * K, index, G * K, live, keys, K, total_k)
