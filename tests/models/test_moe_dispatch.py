"""Which experts a token goes to, and the way of its rows to them and back."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rondo.models.ffn.dispatch import (
    Choice,
    choose,
    collect,
    over_capacity,
    route,
    spread,
    spread_choices,
)

pytestmark = pytest.mark.quick


def inputs(*shape: int, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("multiple", [1, 4])
@pytest.mark.parametrize("drops", [False, True])
def test_rows_come_back_to_their_tokens(drops: bool, multiple: int) -> None:
    experts = torch.randint(0, 5 + drops, (14, 3), generator=torch.Generator().manual_seed(1))
    where = route(experts, 5, drops=drops, multiple=multiple)
    flat, real = experts.flatten(), where.order < 42
    assert torch.equal(flat[where.order[real]], flat[flat < 5].sort().values)
    filled = torch.bincount(flat, minlength=6)[:5].add(multiple - 1) // multiple * multiple
    assert torch.equal(where.counts, filled)
    owners = torch.arange(5).repeat_interleave(where.counts)
    assert torch.equal(flat[where.order[real]], owners[real])
    rows, x = int(filled.sum()), inputs(14, 4)
    torch.testing.assert_close(spread(x, where)[real], x[where.order[real] // 3])
    shares = inputs(14, 3, seed=4)
    expected = torch.where(real, shares.flatten()[where.order.clamp(max=41)], 0.0)
    torch.testing.assert_close(spread_choices(shares, where), expected)
    y = inputs(rows, 4, seed=5)
    slow = torch.zeros(14, 4).double().index_add(0, where.order[real] // 3, y[real])
    torch.testing.assert_close(collect(y, where), slow)
    kept = real[:, None].double()
    assert torch.autograd.gradcheck(lambda x: spread(x, where) * kept, x.requires_grad_())
    assert torch.autograd.gradcheck(lambda y: collect(y * kept, where), y.requires_grad_())


def test_choices_are_distinct_and_weights_sum_to_one() -> None:
    g = inputs(4, 50, 8).softmax(-1)
    choice = choose(g, 3, renormalize=True)
    assert all(len(set(row)) == 3 for row in choice.experts.flatten(0, 1).tolist())
    torch.testing.assert_close(
        choice.weights.sum(-1), torch.ones(4, 50).double(), atol=1e-6, rtol=0
    )
    torch.testing.assert_close(g.sum(-1), torch.ones(4, 50).double(), atol=1e-6, rtol=0)
    raw = choose(g, 3, renormalize=False)
    torch.testing.assert_close(raw.weights, g.topk(3).values)


def test_a_bias_chooses_but_does_not_weigh() -> None:
    g = inputs(2, 5, 4).softmax(-1)
    bias = torch.tensor([0.0, 9.0, 0.0, 0.0])
    choice = choose(g, 1, renormalize=False, bias=bias)
    assert choice.experts.eq(1).all()
    torch.testing.assert_close(choice.weights[..., 0], g[..., 1])


def test_a_bias_may_choose_what_has_no_probability() -> None:
    g = torch.tensor([[[1.0, 0.0, 0.0]]])
    weights = choose(g, 1, renormalize=True, bias=torch.tensor([0.0, 2.0, 0.0])).weights
    assert weights.tolist() == [[[0.0]]]


def test_capacity_drops_the_lowest_scores() -> None:
    experts = torch.tensor([[[0], [0], [0], [1]], [[1], [1], [1], [1]]])
    scores = torch.tensor([[[0.2], [0.9], [0.5], [0.1]], [[0.4], [0.3], [0.6], [0.2]]])
    choice = Choice(experts, torch.ones(2, 4, 1), scores)
    dropped = over_capacity(choice, 2, 1.0)  # room for 2 in each sequence
    assert dropped[..., 0].tolist() == [[True, False, False, False], [False, True, False, True]]
    assert not over_capacity(choice, 2, 2.0).any()


def test_capacity_keeps_the_surest_tokens() -> None:
    """Renormalised, the unsure token's first choice weighs more: 0.68 against 0.6."""
    g = torch.tensor([[[0.3, 0.14, 0.14, 0.14, 0.14, 0.14], [0.6, 0.4, 0.0, 0.0, 0.0, 0.0]]])
    for renormalize in (True, False):
        choice = choose(g, 2, renormalize=renormalize)
        dropped = over_capacity(choice, 6, 1.0)  # room for one
        assert choice.experts[..., 0].tolist() == [[0, 0]]
        assert dropped[..., 0].tolist() == [[True, False]]
