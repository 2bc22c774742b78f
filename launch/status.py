"""`rondo status`: what every run is doing, read from its folder, its lock and SLURM's queue."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rondo.errors import UserError
from rondo.goodput import Goodput, read_goodput
from rondo.launch import slurm
from rondo.launch.eval_records import scored
from rondo.launch.folder import FINAL, RunFolder, is_run
from rondo.launch.lock import is_alive, read_owner
from rondo.launch.options import parse_folder

_ABOUT = (
    "Lists runs: state, steps, loss, tokens a second, age of the last step, goodput, scored "
    "checkpoints, jobs. Goodput is steps that count times their median time, over the time since "
    "the first start; of a single run it also shows where the rest went."
)
_HEADER = ("run", "state", "step", "loss", "tokens/s", "last step", "goodput", "scored", "jobs")
_QUIET_SECONDS = 120.0


@dataclass(frozen=True)
class Status:
    """What there is to know of a run."""

    name: str
    state: str
    """done, running, queued (in SLURM), stopped (on purpose, after a checkpoint), failed (the
    launcher gave up) or dead (it ended without a word)."""
    step: int
    """Steps done."""
    steps: int | None
    """Steps of the whole run."""
    loss: float | None
    tokens_per_second: float | None
    age: float | None
    """Seconds since the last step."""
    goodput: Goodput | None
    """Where the time since the first start went; None where there are no steps yet."""
    scored: tuple[int, int]
    """Checkpoints with results of all their tasks, and all that are or were to be scored."""
    jobs: tuple[str, ...]
    """Jobs in the queue, with their states."""


def read_status(folder: RunFolder, queue: Mapping[str, str], now: float | None = None) -> Status:
    """The status of a run, given the states of jobs in SLURM's queue."""
    path = folder.path / "metrics.jsonl"
    content = path.read_bytes() if path.exists() else b""
    row = _last_row(content)
    step, steps = int(row.get("step", -1)) + 1, folder.steps()
    jobs = tuple(f"{job} {queue[job]}" for job in folder.jobs() if job in queue)
    changed = path.stat().st_mtime if row else None
    age = None if changed is None else max(0.0, (now or time.time()) - changed)
    return Status(
        name=folder.path.name,
        state=_state(folder, step, steps, age, jobs),
        step=step,
        steps=steps,
        loss=row.get("loss"),
        tokens_per_second=row.get("tokens_per_second"),
        age=age,
        goodput=read_goodput(folder.path),
        scored=scored(folder.path),
        jobs=jobs,
    )


def _state(
    folder: RunFolder, step: int, steps: int | None, age: float | None, jobs: Sequence[str]
) -> str:
    lock = folder.launch / "lock"
    owner = read_owner(lock)
    if owner is not None and is_alive(owner, lock):
        return "running"
    if jobs:
        return "queued"
    outcome = folder.outcome()
    if outcome in FINAL:
        return outcome
    if outcome == "interrupted":
        return "stopped"
    if step > 0 and step == steps:
        return "done"
    if folder.events("start"):
        return "dead"
    # `rondo train` or torchrun started it and left no more than metrics and checkpoints.
    if age is not None and age < _QUIET_SECONDS:
        return "running"
    return "stopped" if step and step == folder.saved_step() else "dead"


def _last_row(content: bytes) -> dict[str, Any]:
    """The last whole row of a metrics.jsonl."""
    for line in reversed(content[-(1 << 20) :].splitlines()):
        try:
            return json.loads(line)
        except json.JSONDecodeError:
            continue
    return {}


def table(found: Sequence[Status]) -> str:
    """The statuses of runs as text."""
    return _columns([_HEADER, *map(_cells, found)])


def time_table(goodput: Goodput) -> str:
    """Where the time of a run went, as text."""
    lines = [
        (name, duration(seconds), f"{seconds / goodput.wall:.1%}")
        for name, seconds in goodput.parts.items()
    ]
    title = f"{duration(goodput.wall)} since the first start"
    return _columns([(title, "time", "share"), *lines])


def _columns(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = (
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        for line in lines
    )
    return "\n".join(line.rstrip() for line in padded)


def _cells(status: Status) -> tuple[str, ...]:
    def show(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    return (
        status.name,
        status.state,
        f"{status.step}/{'?' if status.steps is None else status.steps}",
        show(status.loss, ".4f"),
        show(status.tokens_per_second, ",.0f"),
        "-" if status.age is None else duration(status.age),
        show(status.goodput.share if status.goodput else None, ".1%"),
        "/".join(map(str, status.scored)) if status.scored[1] else "-",
        ", ".join(status.jobs) or "-",
    )


def duration(seconds: float) -> str:
    """Seconds in the unit that suits them: 5 s, 12 min, 3.5 h, 2.0 d."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 2 * 3600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} d"


def main(words: Sequence[str]) -> int:
    """Runs `rondo status [DIR]`."""
    try:
        help_text = "folder of run folders, or one run folder (default: runs)"
        word = parse_folder(words, "status", _ABOUT, help_text, default="runs")
    except SystemExit:  # after --help
        return 0
    path = Path(word)
    if not path.is_dir():
        raise UserError(f"{path}: no such folder of runs")
    paths = [path] if is_run(path) else sorted(filter(is_run, path.iterdir()))
    if not paths:
        print(f"no runs in {path}")
        return 0
    queue = slurm.queue()
    found = [read_status(RunFolder(each), queue) for each in paths]
    print(table(found))
    if is_run(path) and (goodput := found[0].goodput):
        print(f"\n{time_table(goodput)}")
    return 0
