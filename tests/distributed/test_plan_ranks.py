"""The plan's bytes against those of a real run on four ranks."""

from __future__ import annotations

import pytest

from rondo.parallel.plan.layers import Layers
from rondo.tests.distributed.plan_cases import CASES, job, measure_all
from rondo.tests.distributed.spawn import run_ranks


def test_bytes_equal_those_of_a_real_run() -> None:
    measured = run_ranks(measure_all, 4)
    for name, (layout, optimizer, options) in CASES.items():
        run = job(layout, optimizer, **options)
        plan = Layers(run).trace(range(run.model.config.num_layers))
        # The plan is of the last of a sequence-parallel group, and otherwise of the first ranks.
        real = measured[(layout.cp - 1) * layout.tp][name]
        for part in ("parameters", "gradients", "optimizer"):
            assert getattr(plan, part) == real[part], (name, part)
        if run.parallel.ep > 1:  # of even loads: what routers choose here is not
            continue
        assert plan.activations == pytest.approx(real["activations"], rel=0.05), name
