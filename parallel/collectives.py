"""Collectives that gradients pass through, over one dimension of the mesh.

Each backward pass is the transpose of its forward: what several ranks read sums up on its way back.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.13 renamed them.
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


def gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """`(P, *x.shape)`: the `x` of every rank, in order. Backward: reduce-scatter."""
    return _Gather.apply(x, group)


def all_to_all(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Row p of `x` `(P, ...)` goes to rank p; row p of the result came from rank p."""
    return _AllToAll.apply(x, group)


def all_reduce(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum over ranks, on every rank. Backward: all-reduce, since every rank reads every `x`."""
    return _AllReduce.apply(x, group)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        out = x.new_empty(dist.get_world_size(group) * x.numel())
        _all_gather(out, x.contiguous().view(-1), group=group)
        return out.view(-1, *x.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        out = grad.new_empty(grad[0].numel())
        _reduce_scatter(out, grad.contiguous().view(-1), group=ctx.group)
        return out.view(grad.shape[1:]), None


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _exchange(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _exchange(grad, ctx.group), None


def _exchange(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    x = x.contiguous()
    out = torch.empty_like(x)
    dist.all_to_all_single(out, x, group=group)
    return out


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _total(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _total(grad, ctx.group), None


def _total(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    out = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(out, group=group)
    return out
