"""Collectives that gradients pass through, over one dimension of the mesh.

Each backward pass is the transpose of its forward: what several ranks read sums up on its way back.
"""

from __future__ import annotations

from collections.abc import Callable
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


def start_gather(x: Tensor, group: dist.ProcessGroup) -> Callable[[], Tensor]:
    """Starts `gather` and returns what waits for it. Backward: the reduce-scatter starts where
    this waits, and is waited for where this starts."""
    flight = _Flight(group)
    started = _StartGather.apply(x, flight)
    return lambda: _FinishGather.apply(started, flight)


def reduce_scatter(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Rank p gets the sum over ranks of row p of `x` `(P, ...)`. Backward: all-gather."""
    return _ReduceScatter.apply(x, group)


def gather_time(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """`(B, T, ...)` from every rank's `(B, T / P, ...)`. Backward: reduce-scatter."""
    return gather(x, group).movedim(0, 1).flatten(1, 2)


def scatter_time(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """This rank's `(B, T / P, ...)` of the sum of all ranks' `(B, T, ...)`. Backward:
    all-gather."""
    parts = x.unflatten(1, (dist.get_world_size(group), -1))
    return reduce_scatter(parts.movedim(1, 0), group)


def slice_time(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """This rank's `(B, T / P, ...)` of a `(B, T, ...)` that is the same on all ranks. The
    gradient is this rank's share: it is zero elsewhere."""
    return x.unflatten(1, (dist.get_world_size(group), -1))[:, dist.get_rank(group)].clone()


def all_to_all(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Row p of `x` `(P, ...)` goes to rank p; row p of the result came from rank p."""
    return _AllToAll.apply(x, group)


def all_to_all_rows(
    x: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup
) -> Tensor:
    """The first `send[0]` rows of `x` go to rank 0, the next `send[1]` to rank 1, and so on; the
    result is what came, `receive[p]` rows from rank p, in order of ranks."""
    return _AllToAllRows.apply(x, send, receive, group)


def all_reduce(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum over ranks, on every rank. Backward: all-reduce, since every rank reads every `x`."""
    return _AllReduce.apply(x, group)


def from_previous(x: Tensor, group: dist.ProcessGroup, *, cyclic: bool = False) -> Tensor:
    """The `x` of the rank before; zeros on the first rank, or the last rank's when `cyclic`.
    Backward: the gradient goes to the rank before."""
    return _FromPrevious.apply(x, group, cyclic)


def receive_previous(like: Tensor, group: dist.ProcessGroup) -> Tensor:
    """What the rank before gives to `send_next`, of the shape and dtype of `like`; waits for it.
    Backward: its gradient goes to that rank. `like` itself gets none, but must require one."""
    return _ReceivePrevious.apply(like, group)


def send_next(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Gives `x` to the next rank's `receive_previous`; returns a token for `after`. Backward:
    waits for the gradient of `x` from that rank."""
    return _SendNext.apply(x, group)


def after(x: Tensor, token: Tensor) -> Tensor:
    """`x`, whose backward pass includes that of the `send_next` that gave the token, at the end:
    the engine takes what was made last first."""
    return _After.apply(x, token)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _gathered(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _reduced(grad, ctx.group), None


class _Flight:
    """A collective on its way, and the tensor that it fills."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.work: dist.Work | None = None
        self.out: Tensor | None = None

    def land(self) -> Tensor:
        assert self.work is not None and self.out is not None, "started before"
        self.work.wait()
        out, self.work, self.out = self.out, None, None
        return out


class _StartGather(torch.autograd.Function):
    """Returns a token, whose gradient says when to wait for that of `x`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, flight: _Flight) -> Tensor:
        ctx.flight = flight
        flight.out, flight.work = _start_gathering(x, flight.group)
        return x.new_zeros(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.flight.land(), None


class _FinishGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, started: Tensor, flight: _Flight) -> Tensor:
        ctx.flight = flight
        return flight.land()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        flight = ctx.flight
        flight.out, flight.work = _start_reducing(grad, flight.group)
        return grad.new_zeros(()), None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _reduced(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _gathered(grad, ctx.group), None


def _start_gathering(x: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Any]:
    out = x.new_empty(dist.get_world_size(group), *x.shape)
    return out, _all_gather(out.view(-1), x.contiguous().view(-1), group=group, async_op=True)


def _start_reducing(x: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Any]:
    out = x.new_empty(x.shape[1:])
    return out, _reduce_scatter(out.view(-1), x.contiguous().view(-1), group=group, async_op=True)


def _gathered(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    out = x.new_empty(dist.get_world_size(group), *x.shape)
    _all_gather(out.view(-1), x.contiguous().view(-1), group=group)
    return out


def _reduced(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    out = x.new_empty(x.shape[1:])
    _reduce_scatter(out.view(-1), x.contiguous().view(-1), group=group)
    return out


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


class _AllToAllRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup
    ) -> Tensor:
        ctx.send, ctx.receive, ctx.group = send, receive, group
        return _exchange_rows(x, send, receive, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchange_rows(grad, ctx.receive, ctx.send, ctx.group), None, None, None


def _exchange_rows(
    x: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup
) -> Tensor:
    out = x.new_empty(sum(receive), *x.shape[1:])
    dist.all_to_all_single(out, x.contiguous(), receive, send, group=group)
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


class _FromPrevious(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, cyclic: bool) -> Tensor:
        ctx.group, ctx.cyclic = group, cyclic
        return _shift(x, group, 1, cyclic)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _shift(grad, ctx.group, -1, ctx.cyclic), None, None


def _shift(x: Tensor, group: dist.ProcessGroup, by: int, cyclic: bool) -> Tensor:
    """`x` moved `by` ranks onward, as one all-to-all of which most parts are empty: every rank
    enters it, and every backend has it."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    send, receive = [0] * size, [0] * size
    if cyclic or 0 <= rank + by < size:
        send[(rank + by) % size] = x.numel()
    if cyclic or 0 <= rank - by < size:
        receive[(rank - by) % size] = x.numel()
    moved = x.new_empty(sum(receive))
    flat = x.contiguous().view(-1)[: sum(send)]
    dist.all_to_all_single(moved, flat, receive, send, group=group)
    return moved.view(x.shape) if len(moved) else torch.zeros_like(x)


class _ReceivePrevious(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, like: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _receive(like, group, -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        _send(grad, ctx.group, -1)
        return None, None


class _SendNext(torch.autograd.Function):
    """Returns a token, whose gradient says when to wait for that of `x`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        ctx.save_for_backward(x)
        _send(x, group, 1)
        return x.new_zeros(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return _receive(x, ctx.group, 1), None


class _After(torch.autograd.Function):
    """`x`, whose gradient reaches a token too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, token: Tensor) -> Tensor:
        ctx.save_for_backward(token)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, torch.zeros_like(*ctx.saved_tensors)


def _send(x: Tensor, group: dist.ProcessGroup, by: int) -> None:
    dist.send(x.contiguous(), group=group, group_dst=dist.get_rank(group) + by)


def _receive(like: Tensor, group: dist.ProcessGroup, by: int) -> Tensor:
    out = torch.empty_like(like, memory_format=torch.contiguous_format)
    dist.recv(out, group=group, group_src=dist.get_rank(group) + by)
    return out
