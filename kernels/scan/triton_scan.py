"""The linear scan on a GPU: a program scans a chunk of a row's positions for a block of channels.

Tiles of TIME positions by BLOCK channels are scanned in parallel, one after another, and hand on a
state. Where rows and channels are too few to fill the chip, rows are cut into chunks: `scan_chunks`
finds what each does to any state, `scan_borders` the state that enters each, and then all are
scanned at once. REVERSE runs from the last position to the first with the factor of the position
after, and the state that enters is then added to the last position.
"""

import triton
import triton.language as tl

from rondo.kernels.triton_support import narrow


@triton.jit
def _combine(first_factor, first_state, factor, state):
    return first_factor * factor, factor * first_state + state


@triton.jit
def place(program, chunks, blocks, width, BLOCK: tl.constexpr):
    """Row, chunk and channels of a program, for offsets in int64 (whose divisions are slow)."""
    row, chunk = program // blocks // chunks, program // blocks % chunks
    column = program % blocks * BLOCK + tl.arange(0, BLOCK)
    return row.to(tl.int64), chunk.to(tl.int64), column, column < width


@triton.jit
def _tile(values, row, t, time, column, inside, width, other):
    """Positions t (those outside of the row give `other`) of some channels, float32."""
    at = (row * time + t)[:, None] * width + column[None, :]
    mask = ((t >= 0) & (t < time))[:, None] & inside[None, :]
    return tl.load(values + at, mask=mask, other=other).to(tl.float32)


@triton.jit
def _starts(ids, row, t, time):
    """Whether a document starts at t; position 0 continues one."""
    within = (t > 0) & (t < time)
    own = tl.load(ids + row * time + t, mask=within, other=0)
    return own != tl.load(ids + row * time + t - 1, mask=within, other=0)


@triton.jit
def _scan_tile(
    a, b, ids, row, t, time, column, inside, width, REVERSE: tl.constexpr, TIME: tl.constexpr
):
    """Running products of factors, and states from zero, of a tile; and both at its far end."""
    source = t + 1 if REVERSE else t
    factor = _tile(a, row, source, time, column, inside, width, 1.0)
    if ids is not None:
        factor = tl.where(_starts(ids, row, source, time)[:, None], 0.0, factor)
    if b is None:
        state = tl.zeros_like(factor)
    else:
        state = _tile(b, row, t, time, column, inside, width, 0.0)
    factor, state = tl.associative_scan((factor, state), 0, _combine, reverse=REVERSE)
    far = (tl.arange(0, TIME) == (0 if REVERSE else TIME - 1))[:, None]
    end_factor = tl.sum(tl.where(far, factor, 0.0), axis=0)
    return factor, state, end_factor, tl.sum(tl.where(far, state, 0.0), axis=0)


@triton.jit(do_not_specialize=["time", "length", "chunks"])
def scan_chunks(
    a, b, ids, products, states, time, length, chunks, blocks, width,
    REVERSE: tl.constexpr, TIME: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The product of factors, and the state from zero, of every chunk: `(B, N, W)`."""
    row, chunk, column, inside = place(tl.program_id(0), chunks, blocks, width, BLOCK)
    product, carry = tl.full((BLOCK,), 1.0, tl.float32), tl.zeros((BLOCK,), tl.float32)
    for i in range(length // TIME):
        tile = length // TIME - 1 - i if REVERSE else i
        t = chunk * length + tile * TIME + tl.arange(0, TIME)
        _, _, factor, state = _scan_tile(
            a, b, ids, row, t, time, column, inside, width, REVERSE, TIME
        )
        product, carry = product * factor, factor * carry + state
    at = (row * chunks + chunk) * width + column
    tl.store(products + at, product, mask=inside)
    tl.store(states + at, carry, mask=inside)


@triton.jit(do_not_specialize=["chunks"])
def scan_borders(
    products, states, first, incoming, product_out, state_out, chunks, blocks, width,
    REVERSE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The state that enters every chunk, `(B, N, W)`; or, into `product_out` and `state_out`
    `(B, W)`, what all chunks do together."""
    row, _, column, inside = place(tl.program_id(0), 1, blocks, width, BLOCK)
    product, carry = tl.full((BLOCK,), 1.0, tl.float32), tl.zeros((BLOCK,), tl.float32)
    if first is not None:
        carry = tl.load(first + row * width + column, mask=inside, other=0.0).to(tl.float32)
    for i in range(chunks):
        chunk = chunks - 1 - i if REVERSE else i
        at = (row * chunks + chunk) * width + column
        if incoming is not None:
            tl.store(incoming + at, carry, mask=inside)
        factor = tl.load(products + at, mask=inside, other=1.0)
        carry = factor * carry + tl.load(states + at, mask=inside, other=0.0)
        product = product * factor
    if product_out is not None:
        tl.store(product_out + row * width + column, product, mask=inside)
        tl.store(state_out + row * width + column, carry, mask=inside)


@triton.jit(do_not_specialize=["time", "length", "chunks"])
def scan_forward(
    a, b, ids, incoming, h, last, time, length, chunks, blocks, width,
    TIME: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """h `(B, T, W)` and the state after the last position, `(B, W)`."""
    row, chunk, column, inside = place(tl.program_id(0), chunks, blocks, width, BLOCK)
    carry = tl.zeros((BLOCK,), tl.float32)
    if incoming is not None:
        entry = incoming + (row * chunks + chunk) * width + column
        carry = tl.load(entry, mask=inside, other=0.0).to(tl.float32)
    for i in range(length // TIME):
        t = chunk * length + i * TIME + tl.arange(0, TIME)
        factor, state, end_factor, end = _scan_tile(
            a, b, ids, row, t, time, column, inside, width, False, TIME
        )
        state = factor * carry[None, :] + state
        carry = end_factor * carry + end
        at = (row * time + t)[:, None] * width + column[None, :]
        mask = (t < time)[:, None] & inside[None, :]
        tl.store(h + at, narrow(state, h.dtype.element_ty), mask=mask)
    if chunk == chunks - 1:
        tl.store(last + row * width + column, carry, mask=inside)


@triton.jit(do_not_specialize=["time", "length", "chunks"])
def scan_backward(
    a, h, first, ids, grad, incoming, grad_a, grad_b, grad_first,
    time, length, chunks, blocks, width, TIME: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients from those of h (`grad`, or None) and of the last state (in `incoming`)."""
    row, chunk, column, inside = place(tl.program_id(0), chunks, blocks, width, BLOCK)
    carry = tl.zeros((BLOCK,), tl.float32)
    if incoming is not None:
        entry = incoming + (row * chunks + chunk) * width + column
        carry = tl.load(entry, mask=inside, other=0.0).to(tl.float32)
    before = tl.zeros((BLOCK,), tl.float32)
    if first is not None:
        before = tl.load(first + row * width + column, mask=inside, other=0.0).to(tl.float32)
    for i in range(length // TIME):
        t = chunk * length + (length // TIME - 1 - i) * TIME + tl.arange(0, TIME)
        factor, state, end_factor, end = _scan_tile(
            a, grad, ids, row, t, time, column, inside, width, True, TIME
        )
        state = factor * carry[None, :] + state
        carry = end_factor * carry + end
        previous = _tile(h, row, t - 1, time, column, inside, width, 0.0)
        previous = tl.where((t == 0)[:, None], before[None, :], previous)
        if ids is not None:
            previous = tl.where(_starts(ids, row, t, time)[:, None], 0.0, previous)
        at = (row * time + t)[:, None] * width + column[None, :]
        mask = (t < time)[:, None] & inside[None, :]
        tl.store(grad_a + at, narrow(state * previous, grad_a.dtype.element_ty), mask=mask)
        tl.store(grad_b + at, narrow(state, grad_b.dtype.element_ty), mask=mask)
    if first is not None:  # noqa: SIM102, one is a constant, the other is not
        if chunk == 0:
            factors = a + row * time * width + column
            carry = carry * tl.load(factors, mask=inside, other=0.0).to(tl.float32)
            out = grad_first + row * width + column
            tl.store(out, narrow(carry, grad_first.dtype.element_ty), mask=inside)
