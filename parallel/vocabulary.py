"""Embedding and loss with the vocabulary divided among ranks; logits are never gathered.

Rank r holds the rows `[r n, (r + 1) n)`, n = ceil(V / P), of the embedding and the output matrix.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor

from rondo.kernels.pointwise import soft_cap_difference_
from rondo.parallel.collectives import gather, gather_time, scatter_time

CHUNK_BYTES = 16 * 2**20
"""Size of the buffer of logits, which holds as many tokens as fit."""


@dataclass(frozen=True)
class Vocabulary:
    """`size` ids divided among the ranks of `group`."""

    size: int
    group: dist.ProcessGroup

    def local(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Place of each id among this rank's rows (0 where it has none), and whether it has one."""
        rows = -(-self.size // dist.get_world_size(self.group))
        first = dist.get_rank(self.group) * rows
        own = (ids >= first) & (ids < first + rows)
        return torch.where(own, ids - first, 0), own

    def look_up(self, tokens: Tensor, weight: Tensor) -> Tensor:
        """This rank's time `(B, T / P, dim)` of the rows `(B, T, dim)` of a divided table: each
        rank looks up what it holds, and the sums are scattered along time."""
        index, own = self.local(tokens)
        return scatter_time(F.embedding(index, weight) * own[..., None], self.group)

    def whole(self, hidden: Tensor) -> Tensor:
        """All of `hidden` `(B, T / P, D)` on every rank; gradients are summed over ranks."""
        return gather_time(hidden, self.group)

    def cross_entropy(
        self,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        *,
        ignore_index: int = -100,
        reduction: str = "none",
        logit_cap: float | None = None,
    ) -> Tensor:
        """`kernels.linear_cross_entropy` of `hidden` `(B, T / P, D)`, divided along time, and a
        divided `weight`; `targets` `(B, T)` are whole. The same result on every rank."""
        hidden = self.whole(hidden).flatten(0, 1)
        local = weight.to_local() if isinstance(weight, DTensor) else weight
        flat = targets.flatten()
        valid = flat != ignore_index
        losses = _Losses.apply(hidden, local, flat.where(valid, 0), self, logit_cap) * valid
        if reduction == "none":
            return losses.view(targets.shape)
        return losses.sum() if reduction == "sum" else losses.sum() / valid.sum().clamp(min=1)


class _Losses(torch.autograd.Function):
    """Loss of each token from this rank's rows of the output matrix. Two exchanges of a number a
    token; the backward pass computes the logits again and needs none.

    Logits are relative to the target's, inside the product, as in `kernels.cross_entropy`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        vocabulary: Vocabulary,
        cap: float | None,
    ) -> Tensor:
        index, own = vocabulary.local(targets)
        head = weight.to(hidden.dtype)
        kind = torch.promote_types(hidden.dtype, torch.float32)
        exact = (hidden.to(kind) * head[index]).sum(1) * own
        dist.all_reduce(exact, group=vocabulary.group)
        shift = exact.to(hidden.dtype)
        sums = torch.empty_like(exact)
        for part in _chunks(hidden, head):
            logits = _logits(hidden, head, shift, part).to(kind)
            soft_cap_difference_(logits, shift[part, None], cap)
            sums[part] = logits.logsumexp(1)
        total = gather(sums, vocabulary.group).logsumexp(0)
        ctx.save_for_backward(hidden, weight, index, own, shift, total)
        ctx.cap = cap
        rest = exact - shift
        soft_cap_difference_(rest, shift, cap)
        return total - rest

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, index, own, shift, total = ctx.saved_tensors
        head = weight.to(hidden.dtype)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=total.dtype)
        for part in _chunks(hidden, head):
            slopes = _logits(hidden, head, shift, part).to(total.dtype)
            cap_slopes = soft_cap_difference_(slopes, shift[part, None], ctx.cap)
            slopes.sub_(total[part, None]).exp_()
            slopes.scatter_add_(1, index[part, None], -own[part, None].to(total.dtype))
            if cap_slopes is not None:
                slopes.mul_(cap_slopes)
            slopes = slopes.mul_(grad[part, None]).to(hidden.dtype)
            torch.mm(slopes, head, out=grad_hidden[part])
            grad_weight += slopes.T @ hidden[part]
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None


def _chunks(hidden: Tensor, head: Tensor) -> Iterator[slice]:
    count = max(1, CHUNK_BYTES // (head.shape[0] * head.element_size()))
    for start in range(0, hidden.shape[0], count):
        yield slice(start, min(start + count, hidden.shape[0]))


def _logits(hidden: Tensor, head: Tensor, shift: Tensor, part: slice) -> Tensor:
    """Logits of this rank's ids less the target's logit."""
    return torch.addmm(shift[part, None], hidden[part], head.T, beta=-1)
