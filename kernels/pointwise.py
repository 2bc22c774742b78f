"""Elementwise operators of channel mixers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rondo.kernels.tiles import row_tiles


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up`, both of one shape and dtype (Shazeer 2020, "GLU variants").

    Only the inputs are kept for the backward pass.

    Raises:
        ValueError: shapes or dtypes differ.
    """
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(
            f"swiglu: gate {tuple(gate.shape)} {gate.dtype} and up {tuple(up.shape)} {up.dtype} "
            "must have one shape and dtype"
        )
    return _SwiGLU.apply(gate, up)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        gates, ups, out = _rows(gate), _rows(up), gate.new_empty(gate.shape)
        for part in row_tiles(gates):
            torch.ops.aten.silu.out(gates[part], out=_rows(out)[part]).mul_(ups[part])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        gates, ups, grads = _rows(gate), _rows(up), _rows(grad)
        grad_gate, grad_up = gate.new_empty(gate.shape), up.new_empty(up.shape)
        for part in row_tiles(gates):
            own, at_gate, at_up = gates[part], _rows(grad_gate)[part], _rows(grad_up)[part]
            torch.ops.aten.silu_backward.grad_input(
                grads[part] * ups[part], own, grad_input=at_gate
            )
            torch.ops.aten.silu.out(own, out=at_up).mul_(grads[part])
        return grad_gate, grad_up


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])
