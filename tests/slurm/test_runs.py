"""Two-node training on a real SLURM; whatever interrupts it, it ends with the same losses."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path

import pytest

from rondo.goodput import ATTEMPTS, read_goodput
from rondo.tests.slurm.cluster import Cluster
from rondo.tests.slurm.runs import STEPS, Run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def straight(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory, data: Path) -> Run:
    """A run that nothing interrupts."""
    run = Run(cluster, tmp_path_factory.mktemp("straight"), data)
    run.launch()
    run.wait_for_outcome("done")
    return run


@pytest.fixture
def run(cluster: Cluster, tmp_path: Path, data: Path, straight: Run) -> Run:
    """A run in a folder of its own."""
    return Run(cluster, tmp_path, data)


def test_two_nodes_train(straight: Run) -> None:
    assert [step for step, *_ in straight.rows()] == list(range(STEPS))
    (start,) = straight.folder.events("start")
    assert len(start["nodes"]) == 2
    logs = straight.folder.launch / "logs" / f"{start['job']}.0.0"
    assert sorted(path.name for path in logs.iterdir()) == ["rank-000.log", "rank-001.log"]
    assert f"step {STEPS}/{STEPS}" in (logs / "rank-000.log").read_text()
    assert "on 2 rank(s)" in (logs / "rank-000.log").read_text()
    listed = straight.rondo("status").splitlines()[1]
    assert re.match(rf"tiny +done +{STEPS}/{STEPS} ", listed)
    goodput = float(re.search(r"([\d.]+)%", listed)[1])
    assert 1 < goodput < 90  # of a run that mostly starts
    assert not (straight.folder.launch / "lock").exists()


def test_requeued_in_mid_run(run: Run, straight: Run) -> None:
    """As an administrator or a job of higher priority does it: ranks have KillWait to save."""
    (job,) = run.launch()
    run.wait_for_rows(6)
    run.cluster.run("scontrol", "requeue", job)
    run.wait_for_outcome("done")
    first, second = run.folder.events("end")
    assert (first["outcome"], first["code"]) == ("interrupted", 75)
    assert first["saved"] >= 6 and first["saved"] < STEPS
    assert "going on after step" in _log(run, 1)
    assert run.folder.events("start")[1]["restarts"] == 1
    assert second["outcome"] == "done"
    assert run.rows() == straight.rows()
    found = read_goodput(run.folder.path)
    assert found is not None
    assert found.kept + sum(found.lost.values()) == pytest.approx(found.wall)
    rows = map(json.loads, (run.folder.path / ATTEMPTS).read_text().splitlines())
    ended = next(row["time"] for row in rows if row["event"] == "end")
    idle = run.folder.events("start")[1]["time"] - ended
    assert found.lost["idle between jobs"] == pytest.approx(idle)
    assert idle > run.folder.events("start")[1]["time"] - first["time"] > 0
    assert found.lost["redone steps"] < 5  # it saved where it stopped


def test_time_limit(run: Run, straight: Run) -> None:
    """The warning comes, the ranks save, and the job requeues itself."""
    (job,) = run.launch("--time=1", "--grace=30")
    run.wait_for_rows(6)
    ranks = run.ranks()
    assert len(ranks) == 2
    for process in ranks.values():
        process.suspend()  # until the limit is near
    assert run.wait_for("signal")["signal"] == "SIGUSR1"
    for process in ranks.values():
        process.resume()
    assert run.wait_for("end")["outcome"] == "interrupted"
    run.wait_for_outcome("done")
    # Once, or on a slow machine more often.
    requeues = [row["job"] for row in run.folder.events("requeue")]
    assert set(requeues) == {job}
    assert len(run.folder.events("start")) == len(requeues) + 1
    assert run.folder.events("end")[0]["saved"] < STEPS
    assert run.rows() == straight.rows()


def test_cancelled(run: Run, straight: Run) -> None:
    """A job that was cancelled stays so, and the next launch goes on."""
    (job,) = run.launch()
    run.wait_for_rows(6)
    run.cluster.run("scancel", job)
    run.wait_for_outcome("interrupted")
    assert not run.folder.events("requeue")
    run.wait("end of the job", lambda: job not in run.cluster.run("squeue", "-h", "-o%i"))
    assert re.search(r"tiny +stopped ", run.rondo("status"))
    run.launch()
    run.wait_for_outcome("done")
    assert run.rows() == straight.rows()


def test_a_process_of_one_node_dies(run: Run, straight: Run) -> None:
    """The ranks start again within the job, from the last checkpoint; whatever the run's name."""
    run.name = 'it\'s 100%j "#1" $HOME'
    run.launch("--sbatch=--comment=a 'b' #c", '--env=SPACES=two  "spaces"')
    run.wait_for_rows(6)
    ranks = run.ranks()
    victim = ranks[max(ranks)]
    assert victim.environ()["SLURM_PROCID"] == "1"
    victim.send_signal(signal.SIGKILL)
    run.wait_for_outcome("done")
    assert len(run.folder.events("start")) == 1
    (failure,) = run.folder.events("failure")
    assert failure["code"] in (1, 137)  # of the survivor, of the victim
    assert "going on after step" in _log(run, 1)
    assert run.rows() == straight.rows()
    facts = run.cluster.run("scontrol", "show", "job", *run.folder.jobs())
    assert f"JobName={run.name}\n" in facts and "Comment=a 'b' #c" in facts
    assert "starting again (1/3)" in run.batch_log(*run.folder.jobs())


def test_stopped_and_gone_on_in_a_chain(run: Run, straight: Run) -> None:
    first, second = run.launch("--chain=2")
    run.wait_for_rows(6)
    listed = run.rondo("status")
    assert re.search(rf"tiny +running .*{first} RUNNING, {second} PENDING", listed)
    said = run.rondo("stop", "tiny")
    assert f"cancelled job {second}" in said and f"asked SLURM job {first}" in said
    run.wait_for_outcome("stopped")
    run.wait("empty queue", lambda: not run.cluster.run("squeue", "-h"))
    assert re.search(r"tiny +stopped ", run.rondo("status"))
    first, second = run.launch("--chain=2")
    run.wait_for_outcome("done")
    run.wait("second job", lambda: (run.folder.launch / f"job-{second}.log").exists())
    run.wait("word", lambda: "has ended already (done): nothing to do" in run.batch_log(second))
    assert len(run.folder.events("start")) == 2
    assert run.rows() == straight.rows()


def test_a_bad_node_is_named_and_left_out(run: Run, straight: Run) -> None:
    tools = run.home / "bin"
    tools.mkdir()
    check = tools / "nvidia-smi"
    check.write_text('#!/bin/sh\n[ "$SLURMD_NODENAME" = n2 ] || echo 0\n')
    check.chmod(0o755)
    run.environment["PATH"] = f"{tools}:{run.environment['PATH']}"
    run.launch("--gpus=1", "--env=CUDA_VISIBLE_DEVICES=", "--sbatch=--nodelist=n2")
    row = run.wait_for("bad nodes")
    assert row["nodes"] == {"n2": "0 GPU(s), 1 wanted"}
    run.wait_for_outcome("interrupted")
    (job,) = run.folder.jobs()
    run.wait(
        "exclusion", lambda: "ExcNodeList=n2" in run.cluster.run("scontrol", "show", "job", job)
    )
    run.cluster.run("scontrol", "update", f"JobId={job}", "ReqNodeList=")
    run.wait_for_outcome("done")
    assert run.folder.events("start")[1]["nodes"] == ["n1", "n3"]
    assert run.rows() == straight.rows()


def _log(run: Run, start: int) -> str:
    """What rank 0 printed after the `start`th start."""
    folders = sorted((run.folder.launch / "logs").iterdir(), key=lambda path: path.stat().st_ctime)
    return (folders[start] / "rank-000.log").read_text()
