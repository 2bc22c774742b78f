"""What is known of the scoring of each checkpoint: `<run>/evals/jobs/step-000001000/`.

    submitted.json   written by whoever watches the run: tasks, where, process or SLURM job
    job.json         written by the job: running, done or failed, attempts, seconds, problem
    lock             held by the job while it runs
    job.log          what the job and `rondo eval` print

Each file has one writer at a time and is replaced as a whole. A file `.step-000001000.hold` in
`checkpoints/` keeps training from deleting a checkpoint; it counts as long as somebody touches it
(`rondo.parallel.checkpoint.files` says for how long).
"""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path
from typing import Any

SETTLED = ("done", "failed")
"""States of a job that nothing follows."""


class EvalRecord:
    """The scoring of one checkpoint of the run in `run`."""

    def __init__(self, run: Path, step: int) -> None:
        name = f"step-{step:09d}"
        self.run, self.step = run, step
        self.checkpoint = run / "checkpoints" / name
        self.results = run / "evals" / name
        self.folder = run / "evals" / "jobs" / name
        self.hold_file = run / "checkpoints" / f".{name}.hold"

    @property
    def submitted(self) -> dict[str, Any]:
        """The last submission; empty before the first."""
        return _read(self.folder / "submitted.json")

    @property
    def job(self) -> dict[str, Any]:
        """What the job says of itself; empty before it runs."""
        return _read(self.folder / "job.json")

    @property
    def settled(self) -> bool:
        """Whether the checkpoint is scored, or was given up."""
        return self.job.get("state") in SETTLED

    def write(self, name: str, **facts: Any) -> None:
        """Replaces `submitted` or `job`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        beside = self.folder / f".{name}.{os.getpid()}"
        beside.write_text(json.dumps({"step": self.step, "time": time.time(), **facts}, indent=1))
        beside.replace(self.folder / f"{name}.json")

    def missing(self, tasks: list[str]) -> list[str]:
        """The tasks without a result."""
        return [task for task in tasks if not (self.results / f"{task}.json").is_file()]

    def hold(self) -> None:
        """Keeps the checkpoint from being deleted, for a while after the last call."""
        self.hold_file.parent.mkdir(parents=True, exist_ok=True)
        self.hold_file.touch()

    def release(self) -> None:
        """Training may delete the checkpoint."""
        self.hold_file.unlink(missing_ok=True)


def checkpoint_steps(run: Path) -> list[int]:
    """Steps of the whole checkpoints of a run, oldest first."""
    found = []
    for path in (run / "checkpoints").glob("step-*"):
        match = re.fullmatch(r"step-(\d{9,18})", path.name)
        if match and (path / "manifest.json").is_file():
            found.append(int(match[1]))
    return sorted(found)


def records(run: Path) -> list[EvalRecord]:
    """The records of a run, by step."""
    names = sorted((run / "evals" / "jobs").glob("step-*"))
    return [EvalRecord(run, int(path.name[5:])) for path in names if path.name[5:].isdecimal()]


def scored(run: Path) -> tuple[int, int]:
    """How many checkpoints have results of all their tasks, of how many that are or were to be
    scored. A result without a job on record, `rondo eval` typed by hand, counts as complete."""
    asked = {record.step: record for record in records(run) if record.submitted}
    found = {
        int(path.name[5:])
        for path in (run / "evals").glob("step-*")
        if path.name[5:].isdecimal() and any(path.glob("*.json"))
    }
    complete = [
        step
        for step in found | set(asked)
        if step not in asked or not asked[step].missing(asked[step].submitted["tasks"])
    ]
    return len(complete), len(found | set(asked))


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return {}
    return found if isinstance(found, dict) else {}
