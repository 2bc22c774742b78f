"""Which experts a token goes to, and the way there and back. Every row is moved once each way.

Letters: n tokens, k experts a token, N experts, B sequences, T tokens in each.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Choice(NamedTuple):
    """The experts of each token."""

    experts: Tensor
    """`(B, T, k)` int64, distinct in a token, the best first."""
    weights: Tensor
    """`(B, T, k)`: shares of their outputs."""


def choose(
    probabilities: Tensor, k: int, *, renormalize: bool, bias: Tensor | None = None
) -> Choice:
    """The `k` experts of highest probability `(B, T, N)`; `bias` `(N,)` has a say in the choice
    but not in the weights. `renormalize`: make weights sum to 1."""
    ranked = probabilities if bias is None else probabilities.detach() + bias
    experts = ranked.topk(k, dim=-1).indices
    weights = probabilities.gather(-1, experts)
    if renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return Choice(experts, weights)


def count_by_row(experts: Tensor, count: int) -> Tensor:
    """`(B, N)` int64: how often each sequence chose each of `count` experts."""
    flat = experts.flatten(1)
    return flat.new_zeros(flat.shape[0], count).scatter_add_(1, flat, torch.ones_like(flat))


def whole_sequence(counts: Tensor) -> Tensor:
    """What a layer's `counts` `(B, N)` are for whole sequences: themselves. An operator: it is
    replaced where ranks hold stretches of a sequence."""
    return counts


def over_capacity(choice: Choice, count: int, factor: float) -> Tensor:
    """`(B, T, k)` bool: choices beyond the `⌈factor · T k / N⌉` of highest weight that an expert
    takes from a sequence."""
    _, time, k = choice.experts.shape
    room = math.ceil(factor * time * k / count)
    by_weight = choice.weights.detach().flatten(1).argsort(dim=1, descending=True, stable=True)
    grouped = choice.experts.flatten(1).gather(1, by_weight).argsort(dim=1, stable=True)
    order = by_weight.gather(1, grouped)  # by expert, and in an expert by weight
    counts = count_by_row(choice.experts, count)
    starts = (counts.cumsum(1) - counts).gather(1, choice.experts.flatten(1).gather(1, order))
    place = torch.arange(time * k, device=order.device) - starts
    return torch.empty_like(order).scatter_(1, order, place).view_as(choice.experts) >= room


class Route(NamedTuple):
    """Choices of all tokens in the order of experts."""

    order: Tensor
    """`(n k,)`: choice (token · k + slot) at each place; dropped ones last."""
    places: Tensor
    """`(n k,)`: place of each choice, the inverse of `order`."""
    counts: Tensor
    """`(N,)`: choices that each expert takes."""
    k: int


def route(experts: Tensor, count: int, dropped: Tensor | None = None) -> Route:
    """Sorts choices `(B, T, k)` by expert, stably."""
    flat = experts.flatten()
    if dropped is not None:
        flat = torch.where(dropped.flatten(), count, flat)
    order = flat.argsort(stable=True)
    places = torch.empty_like(order).scatter_(
        0, order, torch.arange(len(order), device=order.device)
    )
    counts = flat.new_zeros(count + 1).scatter_add_(0, flat, torch.ones_like(flat))[:count]
    return Route(order, places, counts, experts.shape[-1])


def spread(x: Tensor, where: Route) -> Tensor:
    """`(n k, d)`: the token of each place, of `x` `(n, d)`."""
    return _Spread.apply(x, where.order, where.places, where.k)


def collect(y: Tensor, where: Route) -> Tensor:
    """`(n, d)`: for each token the sum of `y` `(n k, d)` over its places."""
    return _Collect.apply(y, where.order, where.places, where.k)


# The transposes of each other; written out because the derivative of indexing adds up row by row.


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, places: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(places)
        ctx.k = k
        return x.index_select(0, order // k)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (places,) = ctx.saved_tensors
        return _token_sums(grad, places, ctx.k), None, None, None


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, order: Tensor, places: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(order)
        ctx.k = k
        return _token_sums(y, places, k)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (order,) = ctx.saved_tensors
        return grad.index_select(0, order // ctx.k), None, None, None


def _token_sums(y: Tensor, places: Tensor, k: int) -> Tensor:
    return F.embedding_bag(places.view(-1, k), y, mode="sum")
