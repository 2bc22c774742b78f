"""Which experts a token goes to, and the way there and back. Every row is moved once each way
(the backward pass fetches inputs again, so that no copies of them are kept).

Letters: n tokens, k experts a token, N experts, B sequences, T tokens in each.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rondo.kernels import combine_rows, gather_rows
from rondo.kernels.tiles import has_numbers


class Choice(NamedTuple):
    """The experts of each token."""

    experts: Tensor
    """`(B, T, k)` int64, distinct in a token, the best first."""
    weights: Tensor
    """`(B, T, k)`: shares of their outputs."""
    scores: Tensor
    """`(B, T, k)`: their probabilities, of which the weights are made."""


def choose(
    probabilities: Tensor, k: int, *, renormalize: bool, bias: Tensor | None = None
) -> Choice:
    """The `k` experts of highest probability `(B, T, N)`; `bias` `(N,)` has a say in the choice
    but not in the weights. `renormalize`: make weights sum to 1."""
    ranked = probabilities if bias is None else probabilities.detach() + bias
    experts = ranked.topk(k, dim=-1).indices
    weights = scores = probabilities.gather(-1, experts)
    if renormalize:
        # A bias may choose experts whose probability is rounded to zero.
        total = weights.sum(-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
        weights = weights / total
    return Choice(experts, weights, scores)


def count_by_row(experts: Tensor, count: int) -> Tensor:
    """`(B, N)` int64: how often each sequence chose each of `count` experts."""
    flat = experts.flatten(1)
    return flat.new_zeros(flat.shape[0], count).scatter_add_(1, flat, torch.ones_like(flat))


def whole_sequence(counts: Tensor) -> Tensor:
    """What a layer's `counts` `(B, N)` are for whole sequences: themselves. An operator: it is
    replaced where ranks hold stretches of a sequence."""
    return counts


def over_capacity(choice: Choice, count: int, factor: float) -> Tensor:
    """`(B, T, k)` bool: choices beyond the `⌈factor · T k / N⌉` of highest score that an expert
    takes from a sequence, the earlier ones first where scores are equal. Not of highest weight:
    renormalised, that of an unsure token's first choice is as high as a sure one's. An operator:
    it is replaced where ranks hold stretches of a sequence."""
    _, time, k = choice.experts.shape
    room = math.ceil(factor * time * k / count)
    by_score = choice.scores.detach().flatten(1).argsort(dim=1, descending=True, stable=True)
    grouped = choice.experts.flatten(1).gather(1, by_score).argsort(dim=1, stable=True)
    order = by_score.gather(1, grouped)  # by expert, and in an expert by score
    counts = count_by_row(choice.experts, count)
    starts = (counts.cumsum(1) - counts).gather(1, choice.experts.flatten(1).gather(1, order))
    place = torch.arange(time * k, device=order.device) - starts
    return torch.empty_like(order).scatter_(1, order, place).view_as(choice.experts) >= room


class Route(NamedTuple):
    """Rows of experts in order, m of them: a choice each, or filling."""

    order: Tensor
    """`(m,)`: the choice (token · k + slot) at each row; n k for filling."""
    places: Tensor
    """`(n k,)`: the row of each choice; m for one that is dropped."""
    counts: Tensor
    """`(N,)`: rows of each expert."""
    k: int
    drops: bool
    """Whether some choices may be dropped."""


def route(experts: Tensor, count: int, *, drops: bool = False, multiple: int = 1) -> Route:
    """Sorts choices `(n, k)` by expert, stably, and fills each expert's rows up to a multiple.
    With `drops`, expert `count` stands for none."""
    flat = experts.flatten()
    order = flat.argsort(stable=True)
    taken = flat.new_zeros(count + 1).scatter_add_(0, flat, torch.ones_like(flat))[:count]
    if drops and has_numbers():  # without, none is dropped: the most there can be
        order = order[: int(taken.sum())]
    rows, counts, total = torch.arange(len(order), device=flat.device), taken, len(order)
    if multiple > 1:
        counts = (taken + multiple - 1) // multiple * multiple
        filling = counts - taken
        before = filling.cumsum(0) - filling
        rows = rows + before.index_select(0, flat.index_select(0, order))
        total = int(counts.sum())
    filled = flat.new_full((total,), len(flat)).scatter_(0, rows, order)
    places = flat.new_full((len(flat),), total).scatter_(0, order, rows)
    return Route(filled, places, counts, experts.shape[-1], drops)


def spread(x: Tensor, where: Route) -> Tensor:
    """`(m, d)`: the token of each row, of `x` `(n, d)`; the last one for filling."""
    return gather_rows(x, where.order, where.places.view(-1, where.k), drops=where.drops)


def collect(y: Tensor, where: Route, shares: Tensor | None = None) -> Tensor:
    """`(n, d)`: for each token the sum of `y` `(m, d)` over its rows, times `shares` `(n, k)`."""
    places = where.places.view(-1, where.k)
    return combine_rows(y, where.order, places, shares, drops=where.drops)


def spread_choices(values: Tensor, where: Route) -> Tensor:
    """`(m,)`: the value of each row's choice, of `values` `(n, k)`; 0 for filling."""
    return F.pad(values.flatten(), (0, 1)).index_select(0, where.order)


def choices_of_rows(values: Tensor, where: Route) -> Tensor:
    """`(n, k)`: the value of each choice's row, of `values` `(m,)`; 0 for a dropped one."""
    return F.pad(values, (0, 1)).index_select(0, where.places).view(-1, where.k)
