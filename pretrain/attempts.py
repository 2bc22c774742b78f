"""What a start of training notes of its time: when it began and ended, and what it does again."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rondo.goodput import ATTEMPTS, LOOKING, SAVING, read_steps


class Attempt:
    """Rows of `attempts.jsonl` in the run folder, which only ever grows; one when training begins
    and one when it ends, unless it is killed. What it holds between is for `rondo.goodput`.

    Args:
        folder: the run folder.
        began: when it began, in seconds since the epoch; now if None.
        active: False on all ranks but the first, which write nothing.
    """

    def __init__(self, folder: Path, began: float | None, *, active: bool) -> None:
        self.folder, self.active = folder, active
        self.began = time.time() if began is None else began
        self._noted = False
        self._seconds = {SAVING: 0.0, LOOKING: 0.0}

    def begin(self, step: int) -> None:
        """Notes that training goes on from `step`, before the rows of later steps are dropped."""
        if self.active:
            done = read_steps(self.folder / "metrics.jsonl")
            again = [row for row in done if row["step"] >= step]
            self._note(event="start", time=self.began, step=step, redone=again)
            self._noted = True

    @contextlib.contextmanager
    def charge(self, key: str) -> Iterator[None]:
        """Counts the time within as lost to what a key of metrics.jsonl names."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[key] += time.perf_counter() - began

    def metrics(self) -> dict[str, float]:
        """The time, and seconds by key since the last call."""
        spent = dict(self._seconds)
        self._seconds = dict.fromkeys(spent, 0.0)
        return {"time": time.time(), **spent}

    def end(self, more: Mapping[str, float]) -> None:
        """Notes the end, with `more` of the kind of `metrics`."""
        if self._noted:
            self._note(event="end", **self.metrics(), **more)

    def _note(self, **row: Any) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / ATTEMPTS).open("a") as file:
            file.write(json.dumps(row) + "\n")


def process_start() -> float:
    """When this process started, in seconds since the epoch; now where Linux does not say."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        ticks = int(fields[19]) / os.sysconf("SC_CLK_TCK")
        return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + ticks
    except (OSError, AttributeError):
        return time.time()
