"""The benchmark of scoring beside training: what it counts, and that it does score."""

from __future__ import annotations

from pathlib import Path

import pytest

from rondo.errors import UserError
from rondo.pretrain import load_recipe
from rondo.pretrain.bench_evals import Run, contest, summary
from rondo.tests.pretrain.test_eval_jobs import SMALL, starts
from rondo.tests.pretrain.test_eval_jobs import control as control


@pytest.mark.quick
def test_summary() -> None:
    scored = [Run(9, 98.0, 2.0, 1.0), Run(10, 99.0, 1.0, 3.0), Run(11, 100.0, 0.0, 2.0)]
    plain = [Run(10, 90.0, 0.0, 0.0), Run(10, 90.0, 0.0, 0.0), Run(20, 90.0, 0.0, 0.0)]
    assert summary({"with": scored, "without": plain}) == {
        "rounds": 3,
        "tokens_per_second_with": 10,
        "tokens_per_second_without": 10,
        "speed_ratio": 0.9,
        "lost_seconds": 2.0,
        "lost_share": 0.02,
        "seconds_after_the_last_step": 2.0,
    }


@pytest.mark.slow
def test_every_other_run_is_scored(tmp_path: Path, control: Path) -> None:
    place = f"--data.folder={tmp_path}/data"
    found = contest(load_recipe("tiny", [*SMALL, place, "--evals.tasks=[a]"]), 2)
    assert starts(control) == [2, 4, 6, 2, 4, 6]
    assert [run.lost_seconds > 0 for run in found["with"]] == [True, True]
    assert [run.lost_seconds for run in found["without"]] == [0.0, 0.0]


@pytest.mark.quick
def test_there_must_be_something_to_score() -> None:
    with pytest.raises(UserError, match=r"evals\.tasks: nothing to measure"):
        contest(load_recipe("tiny"), 1)
