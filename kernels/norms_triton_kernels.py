"""RMS, L2 and gated RMS norm on a GPU: a program holds whole rows.

GATE is 0 for none, 1 for a gate after the norm and 2 for one before it.
"""

import triton
import triton.language as tl

from rondo.kernels.triton_support import narrow


@triton.jit
def _activation(gate, SILU: tl.constexpr):
    """`act(gate)` and its slope."""
    sigmoid = tl.sigmoid(gate)
    slope = sigmoid * (1 - sigmoid)
    if SILU:
        return gate * sigmoid, sigmoid + gate * slope
    return sigmoid, slope


@triton.jit(do_not_specialize=["rows"])
def norm_forward(
    x, gate, weight, y, inverses, rows, x_stride, gate_stride, eps,
    D: tl.constexpr, WIDTH: tl.constexpr, COUNT: tl.constexpr, GATE: tl.constexpr,
    SILU: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    mask = (row < rows)[:, None] & (column < D)[None, :]
    z = tl.load(x + row[:, None] * x_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
    if GATE != 0:
        at = gate + row[:, None] * gate_stride + column[None, :]
        act, _ = _activation(tl.load(at, mask=mask, other=0.0).to(tl.float32), SILU)
        if GATE == 2:
            z = z * act
    inverse = 1 / tl.sqrt_rn(tl.sum(z * z, axis=1) / COUNT + eps)
    z = z * inverse[:, None]
    if weight is not None:
        z = z * tl.load(weight + column, mask=column < D, other=0.0).to(tl.float32)[None, :]
    if GATE == 1:
        z = z * act
    place = y + row[:, None] * D + column[None, :]
    tl.store(place, narrow(z, y.dtype.element_ty), mask=mask)
    tl.store(inverses + row, inverse, mask=row < rows)


@triton.jit(do_not_specialize=["rows"])
def norm_backward(
    grad, x, gate, weight, inverses, grad_x, grad_gate, grad_weights,
    rows, grad_stride, x_stride, gate_stride,
    D: tl.constexpr, WIDTH: tl.constexpr, COUNT: tl.constexpr, GATE: tl.constexpr,
    SILU: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Program p does blocks p, p + P, ... of ROWS rows and sums their gradient of the weight into
    row p of `grad_weights` `(P, D)`."""
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    if weight is not None:
        total = tl.zeros((WIDTH,), tl.float32)
    for block in range(program, tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = block * ROWS + tl.arange(0, ROWS).to(tl.int64)
        mask = (row < rows)[:, None] & (column < D)[None, :]
        at = row[:, None] * x_stride + column[None, :]
        normal = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        inverse = tl.load(inverses + row, mask=row < rows, other=0.0)[:, None]
        at = row[:, None] * grad_stride + column[None, :]
        d = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
        if GATE != 0:
            at = row[:, None] * gate_stride + column[None, :]
            wide = tl.load(gate + at, mask=mask, other=0.0).to(tl.float32)
            act, slope = _activation(wide, SILU)
        if GATE == 2:
            slope = slope * normal
            normal = normal * act
        normal = normal * inverse
        if GATE == 1:
            slope = slope * d * normal
            d = d * act
        if weight is not None:
            total += tl.sum(d * normal, axis=0)
            # Read anew for every block: kept, it would take the registers of a long row.
            scale = tl.load(weight + column, mask=column < D, other=0.0).to(tl.float32)[None, :]
            d = d * scale
            if GATE == 1:
                slope = slope * scale
        along = tl.sum(d * normal, axis=1) / COUNT
        d = (d - normal * along[:, None]) * inverse
        place = row[:, None] * D + column[None, :]
        if GATE == 2:
            slope = slope * d
            d = d * act
        if GATE != 0:
            tl.store(grad_gate + place, narrow(slope, grad_gate.dtype.element_ty), mask=mask)
        tl.store(grad_x + place, narrow(d, grad_x.dtype.element_ty), mask=mask)
    if weight is not None:
        tl.store(grad_weights + program * D + column, total, mask=column < D)
