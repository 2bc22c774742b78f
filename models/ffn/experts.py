"""Experts: many SwiGLUs in two stacked matrices, computed by grouped matrix products.

Letters: n tokens, k experts a token, N experts, m rows (tokens, once for each expert that they go
to, sorted by expert).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rondo.kernels.tiles import stays_in_cache
from rondo.models.ffn.dispatch import collect, route, spread, spread_choices
from rondo.models.init import normal, parameter

_ALIGNMENT = 16
"""Bytes that rows must be a multiple of in torch's grouped products on a GPU."""


class Experts(nn.Module):
    """N SwiGLUs of width `inner`. Expert e is row e of each parameter, under any layout:
    `gate_up_proj` `(N, 2, inner, dim)` and `down_proj` `(N, dim, inner)`."""

    sharding: ClassVar = {"gate_up_proj": "column", "down_proj": "row"}
    """As `Mixer.sharding`, of each expert's matrices; ranks may divide the experts too."""

    def __init__(
        self, count: int, dim: int, inner: int, *, std: float, residual_std: float
    ) -> None:
        super().__init__()
        self.operator: Callable[..., Tensor] = mixture
        self.gate_up_proj = parameter((count, 2, inner, dim), normal(std))
        self.down_proj = parameter((count, dim, inner), normal(residual_std))

    def forward(self, x: Tensor, experts: Tensor, shares: Tensor, *, drops: bool = False) -> Tensor:
        """`(n, dim)`: for each token `x` `(n, dim)` the sum over its `experts` `(n, k)` of
        `shares` `(n, k)` times what they make of it. With `drops`, expert N stands for none."""
        return self.operator(x, experts, shares, self.gate_up_proj, self.down_proj, drops=drops)


def mixture(
    x: Tensor,
    experts: Tensor,
    shares: Tensor,
    gate_up: Tensor,
    down: Tensor,
    *,
    drops: bool = False,
) -> Tensor:
    """What `Experts.forward` says, with its parameters `gate_up` and `down`."""
    count = len(gate_up)
    where = route(experts, count, drops=drops, multiple=_row_multiple(x, experts.numel() / count))
    shares = spread_choices(shares, where)
    return collect(grouped_swiglu(spread(x, where), shares, where.counts, gate_up, down), where)


def _row_multiple(x: Tensor, even: float) -> int:
    """What the rows of an expert are filled up to, of which it gets `even` under an even load.

    The CPU library's first product of a shape costs many times a small product; with one shape for
    each load, every product would be a first one."""
    if x.dtype not in (torch.bfloat16, torch.float16) or not stays_in_cache(x):
        return 1
    return 2 ** min(max(5, int(even / 32).bit_length()), 8)


def grouped_swiglu(
    x: Tensor, shares: Tensor, counts: Tensor, gate_up: Tensor, down: Tensor
) -> Tensor:
    """`share · down_e (silu(gate_e x) · up_e x)` for each row x of expert e. `x` `(m, dim)`,
    sorted by expert; `shares` `(m,)`; `counts` `(N,)` integers that sum to m; `gate_up`
    `(N, 2, inner, dim)`, `down` `(N, dim, inner)`. Computed in the dtype of `x`."""
    ends = counts.cumsum(0, dtype=torch.int32)
    shares, gate_up, down = (each.to(x.dtype) for each in (shares, gate_up, down))
    return _GroupedSwiGLU.apply(x, shares, ends, gate_up.flatten(1, 2), down)


class _GroupedSwiGLU(torch.autograd.Function):
    """Keeps its input and the products before the activation. Shares multiply the inner channels,
    which are fewer than a row's. (Torch's own backward pass of grouped_mm is many times slower on
    a CPU: it asks for layouts that no fast product takes.)"""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, shares: Tensor, ends: Tensor, gate_up: Tensor, down: Tensor
    ) -> Tensor:
        both = _rows_times(x, gate_up.mT, ends)
        ctx.save_for_backward(x, shares, ends, gate_up, down, both)
        gate, up = both.chunk(2, -1)
        return _rows_times(F.silu(gate) * up * shares[:, None], down.mT, ends)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, shares, ends, gate_up, down, both = ctx.saved_tensors
        grad = grad.contiguous()
        (gate, up), share = both.chunk(2, -1), shares[:, None]
        gated = F.silu(gate)
        hidden = gated * up
        at_hidden = _rows_times(grad, down, ends)
        at_shares = (at_hidden * hidden).sum(-1)
        at_down = _outer_sums(grad, hidden * share, ends) if ctx.needs_input_grad[4] else None
        at_hidden = at_hidden * share
        at_both = torch.empty_like(both)
        at_gate, at_up = at_both.chunk(2, -1)
        at_gate.copy_(torch.ops.aten.silu_backward(at_hidden * up, gate))
        torch.mul(at_hidden, gated, out=at_up)
        at_x = _rows_times(at_both, gate_up, ends) if ctx.needs_input_grad[0] else None
        at_gate_up = _outer_sums(at_both, x, ends) if ctx.needs_input_grad[3] else None
        return at_x, at_shares, None, at_gate_up, at_down


def served(x: Tensor, weight: Tensor) -> bool:
    """Whether torch's grouped product takes these operands."""
    if x.shape[0] == 0 or 0 in weight.shape:
        return False
    if torch.compiler.is_compiling() and x.dtype != torch.bfloat16:
        return False  # its description for the compiler knows no other type (torch 2.13)
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
