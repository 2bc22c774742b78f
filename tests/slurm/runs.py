"""Runs of the tiny recipe on the cluster, from the command line, as a user starts them."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from rondo.launch.folder import RunFolder
from rondo.tests.slurm.cluster import Cluster

ROOT = Path(__file__).parents[2]
STEPS = 24
SMALL = ["--model.dim=32", "--data.sequence_length=64", "--data.micro_batch_size=2"]
SMALL += ["--checkpoint.every=4", f"--steps={STEPS}", "--evals.batches=0"]
SMALL += ["--logging.tensorboard=false", "--logging.norms_every=0", "--model.num_layers=3"]
SMALL += ["--model.pattern=[gated_deltanet,attention,mamba2]"]


class Run:
    """A run folder, and commands that are typed beside it, with a Python that has no torch.

    Args:
        cluster: where its jobs run.
        home: the folder in which commands are typed.
        data: where its sources are prepared.
    """

    seconds = 90.0
    """The longest that anything is waited for."""

    def __init__(self, cluster: Cluster, home: Path, data: Path) -> None:
        self.cluster, self.home, self.data = cluster, home, data
        self.name = "tiny"
        self.overrides: list[str] = []
        self.environment = {
            **cluster.environment,
            "PYTHONPATH": str(ROOT / ".typing"),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }

    @property
    def folder(self) -> RunFolder:
        """The run folder."""
        return RunFolder(self.home / "runs" / self.name)

    def rondo(self, *words: str) -> str:
        """What a command of rondo prints."""
        done = subprocess.run(
            [sys._base_executable, "-m", "rondo.launch.cli", *words],
            cwd=self.home,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=self.seconds,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def launch(self, *options: str) -> list[str]:
        """Submits the run on two nodes; returns the ids of its jobs."""
        words = ["launch", "slurm", "tiny", "--nodes=2", "--time=10", f"--python={sys.executable}"]
        overrides = [*SMALL, f"--name={self.name}", f"--data.folder={self.data}"]
        overrides.append(f"--evals.every={self._mark}")
        return self.rondo(*words, *options, "--", *overrides, *self.overrides).split()

    @property
    def _mark(self) -> int:
        """A number that tells this run's processes from others'; no evaluation comes that late."""
        return 10**6 + abs(hash(self.home)) % 10**6

    def ranks(self) -> dict[str, psutil.Process]:
        """Its ranks that run now, by their node."""
        found = {}
        for process in psutil.process_iter():
            try:
                words = process.cmdline()
                if words[1:3] == ["-m", "rondo.pretrain"] and words[-1].endswith(str(self._mark)):
                    found[process.environ()["SLURMD_NODENAME"]] = process
            except psutil.Error:
                continue
        return found

    def rows(self) -> list[tuple[int, float, float]]:
        """Step, loss and gradient norm of each step so far."""
        path = self.folder.path / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [(row["step"], row["loss"], row["grad_norm"]) for row in map(json.loads, lines)]

    def wait_for_rows(self, count: int) -> None:
        """Until `count` steps are done."""
        self.wait(f"{count} steps", lambda: len(self.rows()) >= count)

    def wait_for(self, event: str, count: int = 1) -> dict:
        """Until an event was recorded for the `count`th time; returns its row."""
        self.wait(f"{event} {count}", lambda: len(self.folder.events(event)) >= count)
        return self.folder.events(event)[count - 1]

    def wait_for_outcome(self, outcome: str) -> None:
        """Until the run has ended so, and its jobs with it."""
        self.wait(outcome, lambda: self.folder.outcome() == outcome)

    def wait(self, what: str, ready: Callable[[], bool]) -> None:
        """Until `ready()`."""
        deadline = time.monotonic() + self.seconds
        while not ready():
            if time.monotonic() > deadline:
                logs = [path.read_text() for path in self.folder.launch.rglob("*.log")]
                queue = self.cluster.run("squeue", "-o", "%i %T %r")
                raise AssertionError("\n".join([f"no {what} in time", queue, *logs]))
            time.sleep(0.02)

    def batch_log(self, job: str) -> str:
        """What the batch process of a job printed."""
        return (self.folder.launch / f"job-{job}.log").read_text()
