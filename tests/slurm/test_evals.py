"""Checkpoints of a run on a real SLURM, each scored by a job of its own."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from rondo.launch.eval_records import EvalRecord
from rondo.tests.slurm.cluster import Cluster
from rondo.tests.slurm.runs import ROOT, Run


@pytest.mark.slow
def test_every_scheduled_checkpoint_has_a_result(cluster: Cluster, tmp_path: Path) -> None:
    """Once each, although training is requeued while jobs run and keeps one checkpoint only."""
    control = tmp_path / "control"
    control.mkdir()
    (control / "wait").touch()
    run = Run(cluster, tmp_path, tmp_path / "data")
    run.environment["RONDO_EVAL_COMMAND"] = f"{sys.executable} -S {ROOT}/tests/launch/fake_eval.py"
    run.environment["RONDO_FAKE_EVAL"] = str(control)
    # After the first submission there is time for a requeue, however fast the machine.
    run.overrides += ["--steps=90", "--evals.every=30"]
    run.overrides += ["--evals.tasks=[a,b]", "--evals.where=slurm"]
    run.overrides += ["--checkpoint.keep=1", "--evals.slurm.partition=main"]
    (job,) = run.launch()
    due = [EvalRecord(run.folder.path, step) for step in (30, 60, 90)]
    run.wait("a submission", lambda: bool(due[0].submitted.get("job")))
    run.cluster.run("scontrol", "requeue", job)
    run.wait_for_outcome("done")
    assert len(run.folder.events("start")) == 2
    jobs = [record.submitted["job"] for record in due]
    assert len({*jobs, job}) == 4
    assert all(record.checkpoint.is_dir() for record in due)
    assert "0/3" in run.rondo("status")
    (control / "wait").unlink()
    run.wait("results", lambda: all(record.job.get("state") == "done" for record in due))
    assert not any(record.missing(["a", "b"]) for record in due)
    assert sorted((control / "starts").read_text().split(), key=int) == ["30", "60", "90"]
    assert [record.submitted["number"] for record in due] == [1, 1, 1]
    assert "3/3" in run.rondo("status")
