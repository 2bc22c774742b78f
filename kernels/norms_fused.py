"""RMS and L2 norms with hand-written backward passes that work on rows that stay in cache.

With `r = rsqrt(sum(x^2) / count + eps)` and `n = x * r`, the gradient of a loss that reaches `n` as
`d` is `r * (d - n * sum(d * n) / count)`; count is the dim for RMS and 1 for L2.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from rondo.kernels.tiles import row_tiles


def fused_norm(x: Tensor, weight: Tensor | None, eps: float, count: int) -> Tensor:
    """`x * rsqrt(sum(x^2) / count + eps) * weight`; see `rms_norm`."""
    return _Norm.apply(x, weight, eps, count)


def fused_gated_norm(
    x: Tensor, gate: Tensor, weight: Tensor | None, eps: float, silu: bool, norm_before_gate: bool
) -> Tensor:
    """See `gated_rms_norm`."""
    function = _NormThenGate if norm_before_gate else _GateThenNorm
    return function.apply(x, gate, weight, eps, silu)


def widen(x: Tensor) -> Tensor:
    """At least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def activate(gate: Tensor, silu: bool) -> Tensor:
    """SiLU or sigmoid."""
    return F.silu(gate) if silu else torch.sigmoid(gate)


def _activate_backward(grad: Tensor, gate: Tensor, silu: bool) -> Tensor:
    if silu:
        return torch.ops.aten.silu_backward(grad, gate)
    return torch.ops.aten.sigmoid_backward(grad, torch.sigmoid(gate))


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _new_rows(x: Tensor) -> Tensor:
    """Room for the rows of a result like `x`."""
    return x.new_empty(x.numel() // max(x.shape[-1], 1), x.shape[-1])


def _inverse_norm(x: Tensor, eps: float, count: int) -> Tensor:
    """`(N, 1)` of a wide `(N, D)`."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return norm.square_().div_(count).add_(eps).rsqrt_()


class _WeightGradient:
    """Gradient of the weight, summed over tiles in at least float32."""

    def __init__(self, weight: Tensor | None, x: Tensor) -> None:
        self.weight = None if weight is None else widen(weight)
        self.dtype = None if weight is None else weight.dtype
        self.total = None if weight is None else torch.zeros_like(widen(x[0]))

    def result(self) -> Tensor | None:
        """In the dtype of the weight."""
        return None if self.total is None else self.total.to(self.dtype)


def _norm_backward(
    grad: Tensor, normal: Tensor, inverse: Tensor, weight: _WeightGradient, count: int
) -> Tensor:
    """Gradient of x for `y = normal * weight`, and adds to that of the weight; all wide and
    `(N, D)`; reuses `grad`."""
    product = grad * normal
    if weight.total is None or weight.weight is None:
        along = product.sum(dim=-1, keepdim=True)
    else:
        weight.total += product.sum(dim=0)
        along = (product @ weight.weight).unsqueeze(-1)
        grad = grad.mul_(weight.weight)
    return grad.addcmul_(normal, along, value=-1 / count).mul_(inverse)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float, count: int) -> Tensor:
        rows, out, inverses = _rows(x), _new_rows(x), []
        for part in row_tiles(rows):
            wide = widen(rows[part])
            inverse = _inverse_norm(wide, eps, count)
            y = wide * inverse
            out[part] = y if weight is None else y.mul_(weight)
            inverses.append(inverse)
        ctx.save_for_backward(x, weight, torch.cat(inverses) if inverses else x.new_empty(0, 1))
        ctx.count = count
        return out.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        if x.device.type == "cpu" and x.numel() and not torch.compiler.is_compiling():
            if weight is None and ctx.count == 1:
                return _by_weight_norm(grad, x, inverse), None, None, None
            return *_by_layer_norm(grad, x, weight, inverse, ctx.count), None, None
        rows, wide_grad = _rows(x), _rows(grad).to(inverse.dtype, copy=True)
        grad_weight = _WeightGradient(weight, x.new_empty(1, x.shape[-1]))
        normal = widen(rows) * inverse
        grad_x = _norm_backward(wide_grad, normal, inverse, grad_weight, ctx.count)
        return grad_x.to(x.dtype).view(x.shape), grad_weight.result(), None, None


def _by_layer_norm(
    grad: Tensor, x: Tensor, weight: Tensor | None, inverse: Tensor, count: int
) -> tuple[Tensor, Tensor | None]:
    """Gradients of x and weight by torch's one pass for layer norm, told that the means are 0.

    That pass takes the mean over D, so that `s = sqrt(D / count)` goes into the inverse and out
    of the weight `w`, and it subtracts what a mean would owe, `inverse * s * mean(grad * w / s)`,
    which is added again. Its own gradient of the weight is summed in bfloat16."""
    dim = x.shape[-1]
    scale = (dim / count) ** 0.5
    gain = (inverse.new_ones(dim) if weight is None else weight.to(inverse.dtype)) / scale
    rows, grads, scaled = _rows(x), _rows(grad), inverse * scale
    grad_x, _, _ = torch.ops.aten.native_layer_norm_backward(
        grads, rows, [dim], torch.zeros_like(scaled), scaled, gain, None, [True, False, False]
    )
    owed = (grads @ gain.to(grads.dtype)).unsqueeze(1) * scaled / dim
    grad_x.add_(owed.to(grad_x.dtype))
    if weight is None:
        return grad_x.view(x.shape), None
    grad_weight = widen(grads * rows).T @ inverse
    return grad_x.view(x.shape), grad_weight.squeeze(1).to(weight.dtype)


def _by_weight_norm(grad: Tensor, x: Tensor, inverse: Tensor) -> Tensor:
    """Gradient of an L2 norm's x by torch's one pass for weight normalisation, which makes
    `(d - n * sum(d * n)) / v` of `d` and the norms v of rows, here the inverses of `inverse`.

    Not for weights: `d * weight` would be rounded to the dtype of x on the way in."""
    rows = _rows(x).contiguous()
    grad_x, _ = torch.ops.aten._weight_norm_interface_backward(
        _rows(grad).contiguous(), rows, rows.new_ones(len(rows), 1), inverse.reciprocal(), 0
    )
    return grad_x.view(x.shape)


class _NormThenGate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gate: Tensor, weight: Tensor | None, eps: float, silu: bool
    ) -> Tensor:
        rows, gates, out, inverses = _rows(x), _rows(gate), _new_rows(x), []
        for part in row_tiles(rows):
            wide = widen(rows[part])
            inverse = _inverse_norm(wide, eps, x.shape[-1])
            y = activate(widen(gates[part]), silu).mul_(wide).mul_(inverse)
            out[part] = y if weight is None else y.mul_(weight)
            inverses.append(inverse)
        inverse = torch.cat(inverses) if inverses else x.new_empty(0, 1)
        ctx.save_for_backward(x, gate, weight, inverse)
        ctx.silu = silu
        return out.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, gate, weight, inverses = ctx.saved_tensors
        rows, gates, grads = _rows(x), _rows(gate), _rows(grad)
        grad_x, grad_gate = _new_rows(x), _new_rows(gate)
        grad_weight = _WeightGradient(weight, x.new_empty(1, x.shape[-1]))
        for part in row_tiles(rows):
            inverse, gate_wide, wide_grad = inverses[part], widen(gates[part]), widen(grads[part])
            normal = widen(rows[part]) * inverse
            at_gate = wide_grad * normal
            if weight is not None:
                at_gate.mul_(weight)
            grad_gate[part] = _activate_backward(at_gate, gate_wide, ctx.silu)
            at_normal = activate(gate_wide, ctx.silu).mul_(wide_grad)
            grad_x[part] = _norm_backward(at_normal, normal, inverse, grad_weight, x.shape[-1])
        return grad_x.view(x.shape), grad_gate.view(x.shape), grad_weight.result(), None, None


class _GateThenNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gate: Tensor, weight: Tensor | None, eps: float, silu: bool
    ) -> Tensor:
        rows, gates, out, inverses = _rows(x), _rows(gate), _new_rows(x), []
        for part in row_tiles(rows):
            y = activate(widen(gates[part]), silu).mul_(widen(rows[part]))
            inverse = _inverse_norm(y, eps, x.shape[-1])
            y.mul_(inverse)
            out[part] = y if weight is None else y.mul_(weight)
            inverses.append(inverse)
        inverse = torch.cat(inverses) if inverses else x.new_empty(0, 1)
        ctx.save_for_backward(x, gate, weight, inverse)
        ctx.silu = silu
        return out.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, gate, weight, inverses = ctx.saved_tensors
        rows, gates, grads = _rows(x), _rows(gate), _rows(grad)
        grad_x, grad_gate = _new_rows(x), _new_rows(gate)
        grad_weight = _WeightGradient(weight, x.new_empty(1, x.shape[-1]))
        for part in row_tiles(rows):
            wide, gate_wide, inverse = widen(rows[part]), widen(gates[part]), inverses[part]
            act = activate(gate_wide, ctx.silu)
            normal = (act * wide).mul_(inverse)
            wide_grad = grads[part].to(normal.dtype, copy=True)
            gated = _norm_backward(wide_grad, normal, inverse, grad_weight, x.shape[-1])
            grad_gate[part] = _activate_backward(gated * wide, gate_wide, ctx.silu)
            grad_x[part] = gated.mul_(act)
        return grad_x.view(x.shape), grad_gate.view(x.shape), grad_weight.result(), None, None
