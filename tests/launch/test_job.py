"""What the batch process of a SLURM job decides, with stand-ins for SLURM's commands."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rondo.launch.folder import RunFolder
from rondo.launch.lock import Lock

pytestmark = pytest.mark.quick
ROOT = Path(__file__).parents[2]
TOOLS = {
    "srun": 'case "$*" in *rondo.launch.health*) printf "$HEALTH";; *) exit $CODE;; esac',
    "scontrol": """case "$*" in
    *hostnames*) echo n1; echo n2;;
    *"show job"*) echo "JobId=7 JobState=$STATE Reason=$REASON";;
    "$REFUSED "*) echo "Invalid node name specified" >&2; exit 1;;
    *) echo "$*" >> calls;;
esac""",
}
HEALTHY = r"n1\thealthy\nn2\thealthy\n"
BAD = r"n1\thealthy\nn2\t3 GPU(s), 8 wanted\n"


class Bench:
    """A run folder and a way to run job 7 on it."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.folder = RunFolder(home / "run")
        (home / "bin").mkdir()
        for name, text in TOOLS.items():
            tool = home / "bin" / name
            tool.write_text(f"#!/bin/sh\n{text}\n")
            tool.chmod(0o755)

    def job(self, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Runs the job; what it asked of SLURM is in `calls()`."""
        (self.home / "calls").unlink(missing_ok=True)
        words = ["--folder=run", "--launch=a", "--retries=2", *options, "--", "srun", "train"]
        return subprocess.run(
            [sys.executable, "-m", "rondo.launch.job", *words],
            cwd=self.home,
            env={
                "PATH": f"{self.home}/bin:{os.environ['PATH']}",
                "PYTHONPATH": str(ROOT / ".typing"),
                "SLURM_JOB_ID": "7",
                "SLURM_JOB_NODELIST": "n[1-2]",
                "HEALTH": HEALTHY,
                "CODE": "0",
                "STATE": "RUNNING",
                "REASON": "None",
                **environment,
            },
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def calls(self) -> list[str]:
        path = self.home / "calls"
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_done(bench: Bench) -> None:
    assert bench.job("--requeue").returncode == 0
    assert bench.calls() == [] and bench.folder.outcome() == "done"
    (start,) = bench.folder.events("start")
    assert (start["job"], start["nodes"]) == ("7", ["n1", "n2"])
    again = bench.job("--requeue", CODE="1")
    assert again.returncode == 0 and "ended already (done)" in again.stderr
    assert len(bench.folder.events("start")) == 1


def test_failures(bench: Bench) -> None:
    assert bench.job("--requeue", CODE="2").returncode == 2
    assert bench.calls() == [] and bench.folder.outcome() == "failed"
    bench.folder.record("start", launch="a")
    assert bench.job("--requeue", CODE="9").returncode == 9
    assert len(bench.folder.events("failure")) == 2
    assert bench.calls() == [] and bench.folder.outcome() == "failed"


@pytest.mark.parametrize(
    ("options", "state", "reason", "calls"),
    [
        (["--requeue"], "RUNNING", "None", ["requeue 7"]),
        (["--requeue"], "COMPLETING", "TimeLimit", ["requeue 7"]),
        (["--requeue"], "COMPLETING", "None", []),  # cancelled, or SLURM requeues it
        (["--requeue"], "PENDING", "BeginTime", []),
        ([], "RUNNING", "None", []),  # the next of the chain goes on
    ],
)
def test_after_a_checkpoint(
    options: list[str], state: str, reason: str, calls: list[str], bench: Bench
) -> None:
    assert bench.job(*options, CODE="75", STATE=state, REASON=reason).returncode == 75
    assert bench.calls() == calls and bench.folder.outcome() == "interrupted"


def test_a_stop_holds_for_jobs_to_come(bench: Bench) -> None:
    bench.folder.launch.mkdir(parents=True)
    bench.folder.stop_file.touch()
    done = bench.job("--requeue", CODE="75")
    assert done.returncode == 0 and "ended already (stopped)" in done.stderr
    assert bench.folder.events() == [] and bench.calls() == []


def test_a_bad_node_is_excluded_with_those_that_were(bench: Bench) -> None:
    done = bench.job("--requeue", "--exclude=n[3,7],n9", HEALTH=BAD)
    assert done.returncode == 75 and "n2: 3 GPU(s), 8 wanted" in done.stderr
    assert bench.calls() == ["requeue 7", "update JobId=7 ExcNodeList=n[3,7],n9,n2"]


def test_a_job_goes_on_where_slurm_excludes_no_node(bench: Bench) -> None:
    done = bench.job("--requeue", HEALTH=BAD, REFUSED="update")
    assert done.returncode == 75 and bench.calls() == ["requeue 7"]
    assert "job 7 is not kept from n2: scontrol update JobId=7" in done.stderr
    assert "Invalid node name" in done.stderr and bench.folder.outcome() == "interrupted"


def test_in_a_chain_it_is_excluded_for_the_jobs_to_come(bench: Bench) -> None:
    bench.folder.record("submit", launch="a", jobs=["6", "7", "8", "10"])
    assert bench.job(HEALTH=BAD).returncode == 75
    excluded = "ExcNodeList=n2"
    assert bench.calls() == [f"update JobId=8 {excluded}", f"update JobId=10 {excluded}"]


def test_bad_nodes_without_progress_end_it(bench: Bench) -> None:
    assert [bench.job("--requeue", HEALTH=BAD).returncode for _ in range(3)] == [75, 75, 1]
    assert bench.calls() == [] and bench.folder.outcome() == "failed"
    (bench.folder.path / "checkpoints" / "step-000000005").mkdir(parents=True)
    bench.folder.record("start", launch="a")
    assert bench.job("--requeue", HEALTH=BAD).returncode == 75


def test_where_every_node_is_bad_the_nodes_are_not_to_blame(bench: Bench) -> None:
    done = bench.job("--requeue", HEALTH=r"n1\tno memory\nn2\tno memory\n")
    assert done.returncode == 1 and bench.calls() == []
    assert "every node failed its health check: n1: no memory; n2: no memory" in done.stderr


def test_a_node_without_an_answer_is_bad_but_not_all(bench: Bench) -> None:
    done = bench.job("--requeue", HEALTH=r"n2\thealthy\n")
    assert "n1: no answer to the health check" in done.stderr
    assert bench.calls()[-1] == "update JobId=7 ExcNodeList=n1"
    assert bench.job("--requeue", "--launch=b", HEALTH="").returncode == 75
    assert bench.calls() == ["requeue 7"]


def test_a_folder_that_another_has(bench: Bench) -> None:
    with Lock(bench.folder.launch / "lock"):
        done = bench.job("--requeue")
    assert done.returncode == 2 and f"is held by process {os.getpid()}" in done.stderr
    assert bench.folder.events() == []
