"""Losses and gradients of logits on a GPU: a program reads the row of a token."""

import triton
import triton.language as tl

from rondo.kernels.triton_support import narrow


@triton.jit
def target_logits(
    hidden, weight, targets, logits, hidden_stride, weight_stride,
    D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`hidden . weight[target]`, float32."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, D, BLOCK):
        column = start + tl.arange(0, BLOCK)
        mask = column < D
        x = tl.load(hidden + row * hidden_stride + column, mask=mask, other=0.0)
        w = tl.load(weight + target * weight_stride + column, mask=mask, other=0.0)
        total += x.to(tl.float32) * w.to(tl.float32)
    tl.store(logits + row, tl.sum(total, axis=0))


@triton.jit
def _soft_cap(x, cap):
    """`cap tanh(x / cap)` and its slope, which keeps its digits where it is small; x and 1 where
    `cap` is None."""
    slope = 1.0
    if cap is not None:
        power = tl.exp(-2.0 * tl.abs(x) / cap)
        half = 1.0 / (1.0 + power)
        size = cap * (1.0 - power) * half
        x = tl.where(x < 0.0, -size, size)
        slope = 4.0 * power * half * half
    return x, slope


@triton.jit
def _read(line, column, mask, shift, cap):
    """Logits stored relative to `shift`, with the cap on them relative to that on `shift`, -inf
    where there are none, and the slope of the cap."""
    value = tl.load(line + column, mask=mask, other=-float("inf")).to(tl.float32)
    slope = 1.0
    if cap is not None:
        capped, slope = _soft_cap(value + shift, cap)
        base, _ = _soft_cap(shift, cap)
        value = tl.where(mask, capped - base, -float("inf"))
    return value, slope


@triton.jit
def losses_and_gradients(
    logits, exact, targets, upstream, losses, vocabulary, cap, BLOCK: tl.constexpr
):  # fmt: skip
    """The loss of each row of `logits`, which hold them relative to `exact` (the target's own)
    rounded to their dtype and before there is a `cap` on them, and turns them, given `upstream`,
    into gradients in place."""
    row = tl.program_id(0).to(tl.int64)
    line = logits + row * vocabulary
    column = tl.arange(0, BLOCK)
    own = tl.load(exact + row)
    shift = narrow(own, logits.dtype.element_ty).to(tl.float32)
    # Each lane has a maximum and a sum of its own, so that the loop needs no reductions. A first
    # maximum that is finite keeps exp from seeing inf - inf where a row has none.
    top = tl.full((BLOCK,), -1e30, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocabulary, BLOCK):
        mask = start + column < vocabulary
        value, _ = _read(line, start + column, mask, shift, cap)
        higher = tl.maximum(top, value)
        total = total * tl.exp(top - higher) + tl.exp(value - higher)
        top = higher
    most = tl.max(top, axis=0)
    total = tl.sum(total * tl.exp(top - most), axis=0)
    exactly, _ = _soft_cap(own, cap)
    base, _ = _soft_cap(shift, cap)
    tl.store(losses + row, tl.log(total) + most - exactly + base)
    if upstream is not None:
        scale = tl.load(upstream + row)
        target = tl.load(targets + row)
        for start in range(0, vocabulary, BLOCK):
            mask = start + column < vocabulary
            value, slope = _read(line, start + column, mask, shift, cap)
            gradient = tl.exp(value - most) / total
            gradient = tl.where(start + column == target, gradient - 1.0, gradient) * scale * slope
            tl.store(line + start + column, narrow(gradient, logits.dtype.element_ty), mask=mask)
