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
def losses_and_gradients(
    logits, exact, targets, upstream, losses, vocabulary, BLOCK: tl.constexpr
):  # fmt: skip
    """The loss of each row of `logits`, which hold them relative to `exact` (the target's own)
    rounded to their dtype, and turns them, given `upstream`, into gradients in place."""
    row = tl.program_id(0).to(tl.int64)
    line = logits + row * vocabulary
    column = tl.arange(0, BLOCK)
    # Each lane has a maximum and a sum of its own, so that the loop needs no reductions. A first
    # maximum that is finite keeps exp from seeing inf - inf where a row has none.
    top = tl.full((BLOCK,), -1e30, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocabulary, BLOCK):
        mask = start + column < vocabulary
        value = tl.load(line + start + column, mask=mask, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(top, value)
        total = total * tl.exp(top - higher) + tl.exp(value - higher)
        top = higher
    most = tl.max(top, axis=0)
    total = tl.sum(total * tl.exp(top - most), axis=0)
    own = tl.load(exact + row)
    shift = narrow(own, logits.dtype.element_ty).to(tl.float32)
    tl.store(losses + row, tl.log(total) + most - own + shift)
    if upstream is not None:
        scale = tl.load(upstream + row)
        target = tl.load(targets + row)
        for start in range(0, vocabulary, BLOCK):
            mask = start + column < vocabulary
            value = tl.load(line + start + column, mask=mask, other=-float("inf")).to(tl.float32)
            gradient = tl.exp(value - most) / total
            gradient = tl.where(start + column == target, gradient - 1.0, gradient) * scale
            tl.store(line + start + column, narrow(gradient, logits.dtype.element_ty), mask=mask)
