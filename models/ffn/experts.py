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

from rondo.kernels.expert_products import outer_sums, rows_times
from rondo.kernels.tiles import stays_in_cache
from rondo.models.ffn.dispatch import (
    Route,
    choices_of_rows,
    collect,
    route,
    spread,
    spread_choices,
)
from rondo.models.init import normal, parameter


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
    shares, gate_up, down = (each.to(x.dtype) for each in (shares, gate_up, down))
    return _Mixture.apply(x, shares, gate_up, down, *where)


def _row_multiple(x: Tensor, even: float) -> int:
    """What the rows of an expert are filled up to, of which it gets `even` under an even load.

    The CPU library's first product of a shape costs many times a small product; with one shape for
    each load, every product would be a first one."""
    if x.dtype not in (torch.bfloat16, torch.float16) or not stays_in_cache(x):
        return 1
    return 2 ** min(max(5, int(even / 32).bit_length()), 8)


class _Mixture(torch.autograd.Function):
    """Keeps its input and the products before the activation. What shares multiply is a row of the
    model's width or comes with a sum over rows, never one of the wider inner channels. (Torch's own
    backward pass of grouped_mm is many times slower on a CPU: it asks for layouts that no fast
    product takes.)"""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, shares: Tensor, gate_up: Tensor, down: Tensor, *route: Any
    ) -> Tensor:
        where = Route(*route)
        ends = where.counts.cumsum(0, dtype=torch.int32)
        gate, up = _gate_and_up(spread(x, where), gate_up, ends)
        ctx.save_for_backward(x, shares, gate_up, down, *route[:3], ends, gate, up)
        ctx.rest = route[3:]
        y = rows_times(F.silu(gate).mul_(up), down.mT, ends)
        return collect(y, where, shares)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, shares, gate_up, down, *route, ends, gate, up = ctx.saved_tensors
        where = Route(*route, *ctx.rest)
        at_y, share = spread(grad, where), spread_choices(shares, where)[:, None]
        gated = F.silu(gate)
        hidden = gated * up
        at_hidden = rows_times(at_y, down, ends)
        at_shares = choices_of_rows((at_hidden * hidden).sum(-1), where)
        at_down = outer_sums(at_y * share, hidden, ends) if ctx.needs_input_grad[3] else None
        at_both = gate.new_empty(len(gate), 2 * gate.shape[1])
        at_gate, at_up = at_both.chunk(2, -1)
        torch.mul(at_hidden, gated, out=at_up)
        torch.ops.aten.silu_backward.grad_input(at_hidden.mul_(up), gate, grad_input=at_gate)
        at_x = at_gate_up = None
        if ctx.needs_input_grad[0]:
            at_rows = rows_times(at_both, gate_up.flatten(1, 2), ends)
            at_x = collect(at_rows, where, shares)
        if ctx.needs_input_grad[2]:
            at_gate_up = outer_sums(at_both, spread(x, where) * share, ends)
            at_gate_up = at_gate_up.view_as(gate_up)
        return at_x, at_shares, at_gate_up, at_down, *(None for _ in where)


def _gate_and_up(x: Tensor, weight: Tensor, ends: Tensor) -> tuple[Tensor, ...]:
    """Rows of `x` `(m, dim)` times both matrices of their group's `weight` `(N, 2, inner, dim)`.

    On a CPU passes over the halves of wider rows take twice as long as over rows in a row."""
    if x.is_cpu:
        gate, up = (rows_times(x, matrices.mT, ends) for matrices in weight.unbind(1))
        return gate, up
    return rows_times(x, weight.flatten(1, 2).mT, ends).chunk(2, -1)
