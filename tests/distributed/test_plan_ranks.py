"""The plan's bytes against those of a real run on four ranks."""

from __future__ import annotations

import pytest

from rondo.parallel.mesh import Layout
from rondo.parallel.plan.job import fake_ranks, trace_layers
from rondo.tests.distributed.plan_cases import job, measure
from rondo.tests.distributed.spawn import run_ranks

LAYOUTS = {
    "tp2 x dp_shard2": Layout(dp_shard=2, tp=2),
    "cp2 x dp_shard2": Layout(dp_shard=2, cp=2),
    "dp_replicate2 x dp_shard2": Layout(dp_replicate=2, dp_shard=2),
}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_bytes_equal_those_of_a_real_run(layout: Layout, optimizer: str) -> None:
    run = job(layout, optimizer)
    with fake_ranks(layout) as ranks:
        plan = trace_layers(run, ranks, range(run.config.num_layers))
        rank = ranks.rank
    real = run_ranks(measure, layout.size, layout, optimizer)[rank]
    for part in ("parameters", "gradients", "optimizer", "activations"):
        assert getattr(plan, part) == pytest.approx(real[part], rel=0.05), part
