"""Triton kernel of the gated delta rule's outputs, all chunks at once, given states and V'."""

from __future__ import annotations

import triton
import triton.language as tl

from rondo.kernels.delta_rule.triton_tiles import (
    KEY,
    head_factors,
    key_factors,
    load_lower,
    load_rows,
    pair_factors,
    store_rows,
)
from rondo.kernels.triton_support import dot, narrow


@triton.jit(do_not_specialize=["T"])
def mix_kernel(
    q, k, x, states, scores, g, ids, out, scale, T, G: tl.constexpr, H: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    GATE: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """`scale * ((q from start) S + P x)` with x = V' for one chunk and head and BV columns: o. In
    reverse `scale * P^T x` with x = the gradient of o, for the gradient of V'; states are not used.

    With a decay a key channel P is `scores` `(B, T, H, C)`; otherwise it is made from q and k.
    """
    program = tl.program_id(0).to(tl.int64)
    value_blocks, chunks = tl.cdiv(V, BV), tl.cdiv(T, C)
    values = (program % value_blocks).to(tl.int32) * BV + tl.arange(0, BV)
    head = program // value_blocks % H
    place = program // (value_blocks * H)  # batch * chunks + chunk
    row, start = place // chunks * T, place % chunks * C
    base, left = row + start, T - start
    group = head // (H // G)
    index = tl.arange(0, C)
    live = index < left
    total = tl.zeros((C, BV), tl.float32)
    weights = tl.zeros((C, C), tl.float32)
    if not (REVERSE and GATE == KEY):
        for block in range(0, K, BK):
            keys = block + tl.arange(0, BK)
            readers = load_rows(q + (base * G + group) * K, index, G * K, live, keys, K)
            if GATE != KEY:
                writers = load_rows(k + (base * G + group) * K, index, G * K, live, keys, K)
                # P^T is made as such: Triton before 3.7.1 transposes sums of products wrongly on
                # Hopper (flash-linear-attention issue 640).
                if REVERSE:
                    weights += dot(writers, tl.trans(readers))
                else:
                    weights += dot(readers, tl.trans(writers))
            if not REVERSE:
                if GATE == KEY:
                    by_key = key_factors(g, base, head, left, keys, H, K, C, False)
                    readers = narrow(readers.to(tl.float32) * by_key, q.dtype.element_ty)
                tile = states + (place * H + head) * K * V
                state = load_rows(tile, keys, V, keys < K, values, V)
                total += dot(readers, state)
    if not REVERSE:
        enter, _, _ = head_factors(g, ids, row, start, head, T, H, C, GATE)
        total *= enter[:, None]
    if GATE == KEY:
        pairs = load_lower(scores, base, head, left, H, C)
        if REVERSE:
            pairs = tl.trans(pairs)
    else:
        factors = pair_factors(g, ids, row, start, head, T, H, C, GATE)
        weights *= tl.trans(factors) if REVERSE else factors
        pairs = narrow(weights, q.dtype.element_ty)
    xs = load_rows(x + (base * H + head) * V, index, H * V, live, values, V)
    total = scale * (total + dot(pairs, xs))
    place = out + (base * H + head) * V
    store_rows(place, index, H * V, live, values, V, narrow(total, out.dtype.element_ty))
