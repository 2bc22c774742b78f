"""Experts: many SwiGLUs in three stacked matrices, computed by grouped matrix products.

Two letters: m rows (tokens, once for each expert that they go to, sorted by expert), N experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rondo.kernels import swiglu
from rondo.models.init import normal, parameter

_ALIGNMENT = 16
"""Bytes that rows must be a multiple of in torch's grouped products on a GPU."""


class Experts(nn.Module):
    """N SwiGLUs of width `inner`. Expert e is row e of each parameter, under any layout."""

    sharding: ClassVar = {"gate_proj": "column", "up_proj": "column", "down_proj": "row"}
    """As `Mixer.sharding`, of each expert's matrices; ranks may divide the experts too."""

    def __init__(
        self, count: int, dim: int, inner: int, *, std: float, residual_std: float
    ) -> None:
        super().__init__()
        self.operator: Callable[..., Tensor] = grouped_swiglu
        self.gate_proj = parameter((count, inner, dim), normal(std))
        self.up_proj = parameter((count, inner, dim), normal(std))
        self.down_proj = parameter((count, dim, inner), normal(residual_std))

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        """`x` `(m, dim)`: first the `counts[0]` rows of expert 0, and so on; `counts` `(N,)`."""
        return self.operator(x, counts, self.gate_proj, self.up_proj, self.down_proj)


def grouped_swiglu(x: Tensor, counts: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """`down_e (silu(gate_e x) · up_e x)` for each row x of expert e. `x` `(m, dim)`, sorted by
    expert; `counts` `(N,)` integers that sum to m; `gate`, `up` `(N, inner, dim)`, `down`
    `(N, dim, inner)`. Computed in the dtype of `x`."""
    ends = counts.cumsum(0, dtype=torch.int32)
    gate, up, down = (weight.to(x.dtype) for weight in (gate, up, down))
    hidden = swiglu(grouped_linear(x, gate, ends), grouped_linear(x, up, ends))
    return grouped_linear(hidden, down, ends)


def grouped_linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """`x W_eᵀ` with another matrix for each group of rows.

    Args:
        x: `(m, inputs)`.
        weight: `(N, outputs, inputs)`.
        ends: `(N,)` int32; group e is rows `[ends[e - 1], ends[e])`, and the last ends at m.
    """
    return _GroupedLinear.apply(x, weight, ends)


class _GroupedLinear(torch.autograd.Function):
    # torch's own backward pass of grouped_mm is forty times slower on a CPU: it multiplies
    # transposed layouts there that no fast product takes.

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, ends)
        return _rows_times(x, weight.mT, ends)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, ends = ctx.saved_tensors
        grad = grad.contiguous()
        grad_x = _rows_times(grad, weight, ends) if ctx.needs_input_grad[0] else None
        grad_weight = _outer_sums(grad, x, ends) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight, None


def served(x: Tensor, weight: Tensor) -> bool:
    """Whether torch's grouped product takes these operands."""
    if x.shape[0] == 0 or 0 in weight.shape:
        return False
    if x.device.type == "cpu":
        return x.dtype in (torch.bfloat16, torch.float16, torch.float32)
    widths = (x.shape[1], *weight.shape[1:])
    aligned = all(width * x.element_size() % _ALIGNMENT == 0 for width in widths)
    return x.dtype == torch.bfloat16 and aligned


def _rows_times(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """`(m, b)`: rows of `x` `(m, a)` times their group's `weight` `(N, a, b)`."""
    if served(x, weight):
        return F.grouped_mm(x, weight, offs=ends)
    parts = zip(x.split(_sizes(ends)), weight.unbind(), strict=True)
    return torch.cat([rows @ matrix for rows, matrix in parts])


def _outer_sums(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    """`(N, a, b)`: for each group the sum over its rows of outer products of `left` `(m, a)` and
    `right` `(m, b)`."""
    if served(left, right):
        return F.grouped_mm(left.mT, right, offs=ends)
    sizes = _sizes(ends)
    parts = zip(left.split(sizes), right.split(sizes), strict=True)
    return torch.stack([rows.mT @ others for rows, others in parts])


def _sizes(ends: Tensor) -> list[int]:
    return ends.diff(prepend=ends.new_zeros(1)).tolist()
