"""Where the time of a run went, from its first start to its last step. Standard library only.

Goodput is (steps kept x median step time) / wall time since the first start. Training notes in
`attempts.jsonl` when each of its starts began and ended, and which steps it does again; the rows of
`metrics.jsonl` have the seconds of each step and of what held up the next; `rondo launch` notes in
`launch/events.jsonl` what it did in between.
"""

from __future__ import annotations

import bisect
import itertools
import json
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ATTEMPTS = "attempts.jsonl"
LOST = (
    "start-up",
    "compile and autotune",
    "save stalls",
    "evaluation stalls",
    "redone steps",
    "idle between jobs",
    "slower steps and the rest",
)
"""What the time went into, besides steps that count."""
SAVING, LOOKING, SCORING = "save_seconds", "observe_seconds", "eval_seconds"
"""Keys of a row of `metrics.jsonl`: seconds that a checkpoint, validation and norms, and the
scoring of checkpoints have held training up since the row before."""
_NUMBERS = re.compile(
    rb'"(step|time|seconds|save_seconds|observe_seconds|eval_seconds)": ([0-9.eE+-]+)'
)
Step = dict[str, float]
"""The numbers of a row that tell of time."""


@dataclass(frozen=True)
class Goodput:
    """The time of one run, in seconds."""

    wall: float
    """From the first start to the last thing known: kept and lost together."""
    kept: float
    """Steps that count, each at the median of their times."""
    lost: dict[str, float]
    """By the names of `LOST`. A run of an older rondo has only those that it noted, and the rest in
    the last."""

    @property
    def parts(self) -> dict[str, float]:
        """All of it by name, but for what took no time."""
        parts = {"steps that count": self.kept, **self.lost}
        return {name: seconds for name, seconds in parts.items() if seconds > 0}

    @property
    def share(self) -> float:
        """Goodput, from 0 to 1."""
        return self.kept / self.wall


def read_goodput(run: Path) -> Goodput | None:
    """That of the run in a folder; None where it has no steps or its first start is not known."""
    metrics = run / "metrics.jsonl"
    steps = read_steps(metrics)
    events = _rows(run / "launch" / "events.jsonl")
    noted = [step for step in steps if "time" in step]
    attempts = _attempts(_rows(run / ATTEMPTS), events, noted)
    launched = [row["time"] for row in events if row["event"] == "start"]
    if not launched:
        steps = noted  # an older rondo's are of a time before the first start that is known
    if not steps or not (launched or attempts):
        return None
    first = min([*launched, *(attempt.begin for attempt in attempts)])
    last = attempts[-1].end if attempts else metrics.stat().st_mtime
    return _add_up(steps, attempts, first, last)


def read_steps(metrics: Path) -> list[Step]:
    """The numbers of each whole row of a metrics.jsonl that tell of time."""
    lines = metrics.read_bytes().splitlines() if metrics.exists() else []
    found = [
        {key.decode(): float(value) for key, value in _NUMBERS.findall(line)}
        for line in lines
        if line.endswith(b"}")
    ]
    return [step for step in found if "step" in step and "seconds" in step]


@dataclass
class _Attempt:
    """One start of training."""

    begin: float
    end: float
    steps: list[Step]
    """What it did, in order."""
    redone: list[Step]
    """Those that a later start did again."""
    after: Step
    """What held it up after its last step."""

    def total(self, *keys: str) -> float:
        """Seconds of these kinds."""
        return sum(row.get(key, 0.0) for row in (*self.steps, self.after) for key in keys)

    @property
    def start_up(self) -> float:
        """Seconds until the first step, or the look before it, began."""
        if not self.steps:
            return self.end - self.begin
        return max(0.0, self.steps[0]["time"] - _whole(self.steps[0]) - self.begin)

    @property
    def cut_off(self) -> float:
        """Seconds in a step that was not completed."""
        if not self.steps:
            return 0.0
        return max(0.0, self.end - self.steps[-1]["time"] - _whole(self.after))

    def compiling(self, median: float) -> float:
        """By how much the first step was slower than others."""
        return max(0.0, self.steps[0]["seconds"] - median) if self.steps else 0.0

    def repeated(self, median: float) -> float:
        """Seconds of steps that were done again, but for what is `compiling`."""
        first = self.compiling(median) if self.redone[:1] == self.steps[:1] else 0.0
        return sum(step["seconds"] for step in self.redone) - first


def _whole(row: Step) -> float:
    return sum(row.get(key, 0.0) for key in ("seconds", SAVING, LOOKING, SCORING))


def _attempts(
    records: Sequence[dict[str, Any]], events: Sequence[dict[str, Any]], kept: Sequence[Step]
) -> list[_Attempt]:
    """The starts of training, from what it noted itself and what the launcher did."""
    again = [step for row in records for step in row.get("redone", ()) if "time" in step]
    ids = {(step["step"], step["time"]) for step in again}
    kept = [step for step in kept if (step["step"], step["time"]) not in ids]
    steps = sorted((*_unique(again), *kept), key=lambda step: step["time"])
    times = [step["time"] for step in steps]
    starts = [row["time"] for row in records if row["event"] == "start"]
    found: list[_Attempt] = []
    for start, until in zip(starts, [*starts[1:], float("inf")], strict=False):
        own = steps[bisect.bisect_left(times, start) : bisect.bisect_left(times, until)]
        last = own[-1]["time"] if own else start
        ended = [row for row in records if row["event"] == "end" and last <= row["time"] < until]
        told = [row for row in events if row["event"] != "start" and last <= row["time"] < until]
        before = found[-1].end if found else 0.0
        begun = [row for row in events if row["event"] != "end" and before <= row["time"] <= start]
        attempt = _Attempt(
            begin=begun[-1]["time"] if begun else start,
            end=(ended or told)[0]["time"] if ended or told else last,
            steps=own,
            redone=[step for step in own if (step["step"], step["time"]) in ids],
            after=ended[0] if ended else {},
        )
        found.append(attempt)
    return found


def _unique(steps: Sequence[Step]) -> list[Step]:
    """A start that was killed while it began may have noted the same as the next."""
    return list({(step["step"], step["time"]): step for step in steps}.values())


def _add_up(
    steps: Sequence[Step], attempts: Sequence[_Attempt], first: float, last: float
) -> Goodput:
    median = statistics.median(step["seconds"] for step in steps)
    older = [step for step in steps if "time" not in step]
    gaps = [(a.end, b.begin) for a, b in itertools.pairwise(attempts)]
    if attempts and not older:  # launches before training noted anything
        gaps.append((first, attempts[0].begin))
    lost = {
        "start-up": sum(each.start_up for each in attempts),
        "compile and autotune": sum(each.compiling(median) for each in attempts),
        "save stalls": sum(each.total(SAVING) for each in attempts),
        "evaluation stalls": sum(each.total(LOOKING, SCORING) for each in attempts)
        + sum(step.get(SCORING, 0.0) for step in older),
        # A step that was cut off is done again by the next start.
        "redone steps": sum(each.repeated(median) for each in attempts)
        + sum(each.cut_off for each in attempts[:-1]),
        "idle between jobs": sum(max(0.0, begin - end) for end, begin in gaps),
    }
    compiled = sum(each.compiling(median) for each in attempts if each.steps[:1] != each.redone[:1])
    # Where most steps are as slow as the slowest, the median would count more than they took.
    kept = min(len(steps) * median, sum(step["seconds"] for step in steps) - compiled)
    rest = last - first - kept - sum(lost.values())
    wall = max(last - first, kept + sum(lost.values()))  # a clock that was set may disagree
    return Goodput(wall, kept, {**lost, LOST[-1]: max(0.0, rest)})


def _rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a file of events; those torn by a crash are left out."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and row.get("event") in ("start", "failure", "end"):
            found.append(row)
    return found
