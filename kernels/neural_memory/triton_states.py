"""What goes over the whole state of a neural memory, in Triton: each a single pass.

A state of a layer is `(N, 2 in, out)`, as in `chunk.py`, without gaps: N rows, `width` of in and
`channels` of out. `carried` `(N, 3)` are β, H and P at a chunk's end.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rondo.kernels.triton_support import dot


@triton.jit
def _carried(carried, row):
    """β, H and P of a row."""
    at = carried + row * 3
    return tl.load(at), tl.load(at + 1), tl.load(at + 2)


@triton.jit(do_not_specialize=["tokens"])
def advance(
    state, carried, written, error, out, tokens, width, channels, blocks, tiles,
    BK: tl.constexpr, BV: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """`out = [β M + P S, H S] - writtenᵀ error` for BK inputs and BV outputs of a row, with
    written `(N, C, 2 in)` and error `(N, C, out)`; TOKENS of a chunk at a time."""
    program = tl.program_id(0)
    row = (program // tiles // blocks).to(tl.int64)
    k = (program // tiles % blocks * BK + tl.arange(0, BK)).to(tl.int64)
    v = program % tiles * BV + tl.arange(0, BV)
    at = (row * 2 * width + k)[:, None] * channels + v[None, :]
    half = (row * 0 + width) * channels
    mask = (k < width)[:, None] & (v < channels)[None, :]
    decay, grown, reach = _carried(carried, row)
    weights = tl.load(state + at, mask=mask, other=0.0)
    momentum = tl.load(state + half + at, mask=mask, other=0.0)
    weights, momentum = decay * weights + reach * momentum, grown * momentum
    for start in range(0, tokens, TOKENS):
        t = start + tl.arange(0, TOKENS)
        token = row * tokens + t
        live = t < tokens
        lines = written + token[None, :] * 2 * width + k[:, None]
        within = (k < width)[:, None] & live[None, :]
        errors = tl.load(
            error + token[:, None] * channels + v[None, :],
            mask=live[:, None] & (v < channels)[None, :],
            other=0.0,
        )
        weights -= dot(tl.load(lines, mask=within, other=0.0), errors)
        momentum -= dot(tl.load(lines + width, mask=within, other=0.0), errors)
    tl.store(out + at, weights, mask=mask)
    tl.store(out + half + at, momentum, mask=mask)


@triton.jit(do_not_specialize=["size"])
def advance_backward(
    state, carried, to_out, to_state, to_carried, size, blocks, BLOCK: tl.constexpr
):  # fmt: skip
    """Adds to `to_state` what comes through β, H and P; writes their gradients, summed over a
    block of a row, `(N, blocks, 3)`. `size`: in x out."""
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64)
    place = (program % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = place < size
    first = row * 2 * size + place
    second = first + size
    decay, grown, reach = _carried(carried, row)
    to_weights = tl.load(to_out + first, mask=mask, other=0.0)
    to_momentum = tl.load(to_out + second, mask=mask, other=0.0)
    weights = tl.load(state + first, mask=mask, other=0.0)
    momentum = tl.load(state + second, mask=mask, other=0.0)
    before = tl.load(to_state + first, mask=mask, other=0.0)
    tl.store(to_state + first, before + decay * to_weights, mask=mask)
    before = tl.load(to_state + second, mask=mask, other=0.0)
    tl.store(to_state + second, before + grown * to_momentum + reach * to_weights, mask=mask)
    to = to_carried + (row * blocks + program % blocks) * 3
    tl.store(to, tl.sum(to_weights * weights))
    tl.store(to + 1, tl.sum(to_momentum * momentum))
    tl.store(to + 2, tl.sum(to_weights * momentum))


@triton.jit(do_not_specialize=["size"])
def scale(state, scales, size, blocks, BLOCK: tl.constexpr):
    """Weights and momentum of each row times `scales` `(N, 2)`, in place; where that is 1 nothing
    is read. `size`: in x out."""
    program = tl.program_id(0)
    half = (program // blocks).to(tl.int64)
    by = tl.load(scales + half)
    if by != 1.0:
        place = (program % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        mask = place < size
        at = state + half * size + place
        tl.store(at, by * tl.load(at, mask=mask, other=0.0), mask=mask)
