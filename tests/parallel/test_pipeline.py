"""How layers are cut into stages, and which rank holds which."""

from __future__ import annotations

import itertools
import random

import pytest

from rondo.models import ModelConfig
from rondo.parallel.pipeline import (
    SCHEDULES,
    layer_flops,
    rank_stages,
    split_evenly,
    stage_count,
)

pytestmark = pytest.mark.quick


def test_stages_have_the_least_possible_largest_cost() -> None:
    draw = random.Random(0)
    for _ in range(40):
        costs = [draw.choice([1.0, 2.0, 5.0, 9.0]) for _ in range(draw.randint(1, 8))]
        for parts in range(1, len(costs) + 1):
            found = split_evenly(costs, parts)
            assert [i for stage in found for i in stage] == list(range(len(costs)))
            assert len(found) == parts and all(len(stage) for stage in found)
            largest = max(sum(costs[i] for i in stage) for stage in found)
            cuts = itertools.combinations(range(1, len(costs)), parts - 1)
            bounds = ([0, *cut, len(costs)] for cut in cuts)
            best = min(max(sum(costs[a:b]) for a, b in itertools.pairwise(b_)) for b_ in bounds)
            assert largest == best


def test_fewer_layers_than_stages_are_refused() -> None:
    with pytest.raises(ValueError, match="3 layers cannot make 4 stages"):
        split_evenly([1.0] * 3, 4)


def test_the_output_matrix_counts_for_the_last_stage() -> None:
    config = ModelConfig(vocab_size=50_000, dim=64, num_layers=12, pattern=["gated_deltanet"])
    first, last = split_evenly(layer_flops(config, 128), 2)
    assert len(last) == 1 and len(first) == 11


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_stage_has_one_rank(schedule: str) -> None:
    for pp in (1, 2, 4):
        held = [stage for rank in range(pp) for stage in rank_stages(rank, pp, schedule)]
        assert sorted(held) == list(range(stage_count(pp, schedule)))
