"""The short convolution on a GPU: a program makes a tile of TIME positions by BLOCK channels.

Positions before the row, down to -HISTORY, are those of the state that came in. `ids` are the
documents of the state and of the row, `(B, HISTORY + T)`.
"""

import triton
import triton.language as tl

from rondo.kernels.triton_support import narrow


@triton.jit
def _input(x, state, row, t, time, column, inside, channels, HISTORY: tl.constexpr):
    """Inputs at positions t, of the row or of the state, float32; zeros outside of both."""
    mask = ((t >= 0) & (t < time))[:, None] & inside[None, :]
    at = (row * time + t)[:, None] * channels + column[None, :]
    value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    if HISTORY > 0:
        mask = ((t < 0) & (t >= -HISTORY))[:, None] & inside[None, :]
        at = (row * HISTORY + HISTORY + t)[:, None] * channels + column[None, :]
        value += tl.load(state + at, mask=mask, other=0.0).to(tl.float32)
    return value


@triton.jit
def _document(ids, row, t, time, HISTORY: tl.constexpr):
    """The document at positions t."""
    mask = (t >= -HISTORY) & (t < time)
    return tl.load(ids + row * (time + HISTORY) + HISTORY + t, mask=mask, other=0)


@triton.jit
def _before_activation(
    x, weight, bias, state, ids, row, t, time, column, inside, channels, HISTORY: tl.constexpr
):
    """`bias + sum_s weight[:, HISTORY - s] x_{t - s}` over the inputs of t's document."""
    scale = tl.load(weight + column * (HISTORY + 1) + HISTORY, mask=inside, other=0.0)
    value = _input(x, state, row, t, time, column, inside, channels, HISTORY)
    total = value * scale.to(tl.float32)[None, :]
    for s in tl.static_range(1, HISTORY + 1):
        value = _input(x, state, row, t - s, time, column, inside, channels, HISTORY)
        if ids is not None:
            own = _document(ids, row, t, time, HISTORY)
            own = own == _document(ids, row, t - s, time, HISTORY)
            value = tl.where(own[:, None], value, 0.0)
        scale = tl.load(weight + column * (HISTORY + 1) + HISTORY - s, mask=inside, other=0.0)
        total += value * scale.to(tl.float32)[None, :]
    if bias is not None:
        total += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    return total


@triton.jit(do_not_specialize=["time", "tiles"])
def conv_forward(
    x, weight, bias, state, ids, y, time, tiles, blocks, channels,
    HISTORY: tl.constexpr, SILU: tl.constexpr, TIME: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    column = program % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = column < channels
    row = (program // blocks // tiles).to(tl.int64)
    t = program // blocks % tiles * TIME + tl.arange(0, TIME)
    total = _before_activation(
        x, weight, bias, state, ids, row, t, time, column, inside, channels, HISTORY
    )
    if SILU:
        total = total * tl.sigmoid(total)
    at = (row * time + t)[:, None] * channels + column[None, :]
    mask = (t < time)[:, None] & inside[None, :]
    tl.store(y + at, narrow(total, y.dtype.element_ty), mask=mask)


@triton.jit
def _activation_gradient(
    grad, x, weight, bias, state, ids, row, t, time, column, inside, channels,
    HISTORY: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """Gradient of what the activation is given, at positions t; zeros outside of the row."""
    mask = ((t >= 0) & (t < time))[:, None] & inside[None, :]
    at = (row * time + t)[:, None] * channels + column[None, :]
    value = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
    if SILU:
        total = _before_activation(
            x, weight, bias, state, ids, row, t, time, column, inside, channels, HISTORY
        )
        sigmoid = tl.sigmoid(total)
        value = value * (sigmoid + total * sigmoid * (1 - sigmoid))
    return value


@triton.jit(do_not_specialize=["time", "tiles", "rows"])
def conv_backward(
    grad, x, weight, bias, state, ids, grad_x, grad_state, grad_weights, grad_biases,
    time, tiles, rows, blocks, channels,
    HISTORY: tl.constexpr, TAPS: tl.constexpr, SILU: tl.constexpr,
    TIME: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of P programs for a block of channels, program p does tiles p, p + P, ... of all rows, and
    sums their gradients of weight and bias into `grad_weights[p]` `(HISTORY + 1, C)` and
    `grad_biases[p]` `(C,)`. Tiles begin at position -HISTORY: the state has a gradient too."""
    program = tl.program_id(0)
    column = program % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = column < channels
    tap = tl.arange(0, TAPS)
    weights = tl.zeros((TAPS, BLOCK), tl.float32)
    biases = tl.zeros((BLOCK,), tl.float32)
    share = (program // blocks).to(tl.int64)
    for i in range(share, rows.to(tl.int64) * tiles, tl.num_programs(0) // blocks):
        row = i // tiles
        t = (i % tiles).to(tl.int32) * TIME - HISTORY + tl.arange(0, TIME)
        own = _activation_gradient(
            grad, x, weight, bias, state, ids, row, t, time, column, inside, channels,
            HISTORY, SILU,
        )  # fmt: skip
        biases += tl.sum(own, axis=0)
        total = tl.zeros((TIME, BLOCK), tl.float32)
        for s in tl.static_range(HISTORY + 1):
            # What is owed at t to the output at t + s, and by the output at t to t - s.
            reached, reaching = own, own
            if s > 0:
                reached = _activation_gradient(
                    grad, x, weight, bias, state, ids, row, t + s, time, column, inside,
                    channels, HISTORY, SILU,
                )  # fmt: skip
                if ids is not None:
                    here = _document(ids, row, t, time, HISTORY)
                    later = _document(ids, row, t + s, time, HISTORY) == here
                    reached = tl.where(later[:, None], reached, 0.0)
                    earlier = _document(ids, row, t - s, time, HISTORY) == here
                    reaching = tl.where(earlier[:, None], own, 0.0)
            scale = tl.load(weight + column * (HISTORY + 1) + HISTORY - s, mask=inside, other=0.0)
            total += reached * scale.to(tl.float32)[None, :]
            value = _input(x, state, row, t - s, time, column, inside, channels, HISTORY)
            products = tl.sum(reaching * value, axis=0)
            weights += tl.where((tap == HISTORY - s)[:, None], products[None, :], 0.0)
        mask = ((t >= 0) & (t < time))[:, None] & inside[None, :]
        at = (row * time + t)[:, None] * channels + column[None, :]
        tl.store(grad_x + at, narrow(total, grad_x.dtype.element_ty), mask=mask)
        if HISTORY > 0:
            mask = (t < 0)[:, None] & inside[None, :]
            at = (row * HISTORY + HISTORY + t)[:, None] * channels + column[None, :]
            tl.store(grad_state + at, narrow(total, grad_state.dtype.element_ty), mask=mask)
    place = (share * (HISTORY + 1) + tap)[:, None] * channels + column[None, :]
    tl.store(grad_weights + place, weights, mask=(tap <= HISTORY)[:, None] & inside[None, :])
    tl.store(grad_biases + share * channels + column, biases, mask=inside)
