"""Attention over ranks with keys and values that travel: ring attention, arXiv 2310.01889.

Rank r holds positions [r L, (r + 1) L). At step s it meets the keys and values of rank r - s, while
those of rank r - s - 1 are on their way to it. Attention is causal: nothing travels past the last
rank, and with a window nothing travels further than it reaches. B batch, L positions a rank, P
ranks, H query and G key/value heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from rondo.kernels.softmax_attention.partial import (
    merge_partial,
    partial_attention,
    partial_attention_backward,
)


def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ids: Tensor | None,
    group: dist.ProcessGroup,
    window: int | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Attention of this rank's `(B, L, H, D)` queries over the whole row, for any H and G, and its
    log-sum-exp.

    Args:
        ids: `(P, B, L)` documents of every rank's positions, or None.
    """
    return _RingAttention.apply(q, k, v, ids, _Ring(group, q.shape[1], window), scale)


class _Ring:
    """Who holds whose keys and values when, and the transfers between.

    All ranks go through the same rounds in the same order, and what is sent in a round is received
    in it. A round is one batch, so that no rank's send waits for another's receive.
    """

    def __init__(self, group: dist.ProcessGroup, length: int, window: int | None) -> None:
        self.group, self.length, self.window = group, length, window
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.hops = self.size - 1
        if window is not None:  # the first query of a stretch sees window - 1 positions before it
            self.hops = min(self.hops, math.ceil((window - 1) / length))

    def last_reader(self, owner: int) -> int:
        """The last rank that the keys and values of `owner` come to."""
        return min(owner + self.hops, self.size - 1)

    def place(self, owner: int, ids: Tensor | None) -> dict[str, Any]:
        """Where this rank's queries and the keys of `owner` lie."""
        return {
            "query_start": self.rank * self.length,
            "key_start": owner * self.length,
            "window": self.window,
            "segment_ids": None if ids is None else ids[self.rank],
            "key_segment_ids": None if ids is None else ids[owner],
        }

    def pass_on(
        self, held: Tensor, step: int, home: Tensor | None = None
    ) -> tuple[Tensor, list[dist.Work]]:
        """Starts round `step`: `held`, which belongs to rank r - step, goes one rank further.

        Args:
            home: where what belongs to this rank comes back to in the round after its last reader
                has held it; None when it does not come back.

        Returns:
            What this rank holds at the next step, if anything, and the transfers to wait for.
        """
        owner, arriving = self.rank - step, held
        transfers = []
        if owner >= 0 and self.rank < self.last_reader(owner):
            transfers.append(self._transfer(dist.isend, held, self.rank + 1))
        elif owner >= 0 and owner < self.rank and home is not None:
            transfers.append(self._transfer(dist.isend, held, owner))
        if owner >= 1 and step < self.hops:
            arriving = torch.empty_like(held)
            transfers.append(self._transfer(dist.irecv, arriving, self.rank - 1))
        if home is not None and step > 0 and self.last_reader(self.rank) == self.rank + step:
            transfers.append(self._transfer(dist.irecv, home, self.rank + step))
        return arriving, dist.batch_isend_irecv(transfers) if transfers else []

    def _transfer(self, kind: Callable, x: Tensor, peer: int) -> dist.P2POp:
        return dist.P2POp(kind, x, dist.get_global_rank(self.group, peer), self.group)


class _RingAttention(torch.autograd.Function):
    """Saves this rank's own q, k, v, output and log-sum-exp; the others' keys travel again."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, ids: Tensor | None, ring: _Ring, scale: float
    ) -> tuple[Tensor, Tensor]:
        held = _pack(k, v)
        arriving, works = ring.pass_on(held, 0)
        out, lse = partial_attention(q, k, v, scale=scale, **ring.place(ring.rank, ids))
        for step in range(1, min(ring.hops, ring.rank) + 1):
            _wait(works)
            held = arriving
            arriving, works = ring.pass_on(held, step)
            place = ring.place(ring.rank - step, ids)
            part = partial_attention(q, *_unpack(held, k, v), scale=scale, **place)
            out, lse = merge_partial(out, lse, *part)
        _wait(works)
        out = out.to(v.dtype)
        ctx.save_for_backward(q, k, v, ids, out, lse)
        ctx.ring, ctx.scale = ring, scale
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of keys and values follow them one round behind and end with their owner."""
        q, k, v, ids, out, lse = ctx.saved_tensors
        ring = ctx.ring
        delta = (grad.to(lse.dtype) * out).sum(-1) - grad_lse

        def meet(held: Tensor, owner: int) -> tuple[Tensor, Tensor]:
            grad_q, grad_k, grad_v = partial_attention_backward(
                grad, q, *_unpack(held, k, v), lse, delta, scale=ctx.scale, **ring.place(owner, ids)
            )
            return grad_q, _pack(grad_k, grad_v)

        held = _pack(k, v)
        arriving, works = ring.pass_on(held, 0)
        grad_q, home = meet(held, ring.rank)
        follower, follows = ring.pass_on(home, 0, home)
        for step in range(1, ring.hops + 1):
            owner = ring.rank - step
            _wait(works)
            held = arriving
            arriving, works = ring.pass_on(held, step)
            if owner >= 0:
                part, grads = meet(held, owner)
                _wait(follows)
                grad_q, follower = grad_q.add_(part), grads.add_(follower)
            else:
                _wait(follows)
            # From the first round on `home` has been sent, so that it can be received into.
            follower, follows = ring.pass_on(follower, step, home)
        _wait(works + follows)
        grad_k, grad_v = _unpack(home, k, v)
        return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype), None, None, None


def _pack(k: Tensor, v: Tensor) -> Tensor:
    """Both in one flat tensor, to travel as one."""
    return torch.cat((k.flatten(), v.flatten()))


def _unpack(packed: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of `_pack`, for the shapes of `k` and `v`."""
    first, second = packed.split((k.numel(), v.numel()))
    return first.view(k.shape), second.view(v.shape)


def _wait(works: list[dist.Work]) -> None:
    for work in works:
        work.wait()
