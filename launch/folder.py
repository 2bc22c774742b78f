"""A run's folder as launchers see it: how far the run is, and the log of its starts."""

from __future__ import annotations

import contextlib
import json
import re
import time
from pathlib import Path
from typing import Any

from rondo.errors import UserError

FINAL = ("done", "failed", "stopped")
"""Outcomes after which no later job of the same launch has anything to do."""


class RunFolder:
    """`runs/<name>`, and in it `launch/`: `events.jsonl`, `lock`, `stop`, a folder of logs a start.

    `events.jsonl` has a row for every submission, start, signal and end, and only ever grows; the
    owner of the lock writes it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.launch = path / "launch"
        self.stop_file = self.launch / "stop"
        """Exists while `rondo stop` wants the run not to go on."""

    def record(self, event: str, **facts: Any) -> None:
        """Appends a row to `events.jsonl`."""
        self.launch.mkdir(parents=True, exist_ok=True)
        with (self.launch / "events.jsonl").open("a") as file:
            file.write(json.dumps({"time": time.time(), "event": event, **facts}) + "\n")

    def events(self, event: str | None = None, launch: str | None = None) -> list[dict[str, Any]]:
        """The rows of `events.jsonl`, of one kind or of one launch only if given."""
        try:
            lines = (self.launch / "events.jsonl").read_text().splitlines()
        except FileNotFoundError:
            return []
        rows = [row for row in map(_parse, lines) if row]
        return [
            row
            for row in rows
            if event in (None, row["event"]) and launch in (None, row.get("launch"))
        ]

    def outcome(self, launch: str | None = None) -> str | None:
        """How the last start ended; None while there is none, or while it runs."""
        rows = self.events(launch=launch)
        last = next((row for row in reversed(rows) if row["event"] in ("start", "end")), {})
        return last.get("outcome")

    def jobs(self, launch: str | None = None) -> list[str]:
        """Ids of the SLURM jobs of the last submission (of `launch`)."""
        submitted = self.events("submit", launch)
        return submitted[-1]["jobs"] if submitted else []

    def container(self) -> dict[str, Any]:
        """The container of the last submission to SLURM; empty where it has none."""
        submitted = self.events("submit")
        return submitted[-1].get("container", {}) if submitted else {}

    def saved_step(self) -> int:
        """Step of the newest checkpoint; 0 without one."""
        folders = (self.path / "checkpoints").glob("step-*")
        return max((int(path.name[5:]) for path in folders if path.name[5:].isdecimal()), default=0)

    def steps(self) -> int | None:
        """Steps of the whole run, once it has started."""
        with contextlib.suppress(OSError, ValueError, KeyError):
            return int(json.loads((self.path / "stages.json").read_text())["steps"])
        try:
            found = re.search(r"^steps: (\d+)$", (self.path / "recipe.yaml").read_text(), re.M)
        except FileNotFoundError:
            return None
        return int(found[1]) if found else None

    def new_logs(self, start: str) -> Path:
        """A new folder for the logs of the ranks of one start."""
        parent, number = self.launch / "logs", 0
        while True:
            path = parent / f"{start}.{number}"
            try:
                path.mkdir(parents=True)
            except FileExistsError:
                number += 1
            else:
                return path


def _parse(line: str) -> dict[str, Any] | None:
    """A row; None for one torn by a crash."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return None
    return row if isinstance(row, dict) and "event" in row else None


def find_run(word: str) -> RunFolder:
    """The run folder at a path, or the one of that name under `runs/`."""
    for path in (Path(word), Path("runs") / word):
        if is_run(path):
            return RunFolder(path)
    names = sorted(path.name for path in Path("runs").glob("*") if is_run(path))
    raise UserError(f"no run folder {word!r} (under runs/: {', '.join(names) or 'none'})")


def is_run(path: Path) -> bool:
    """Whether a folder is that of a run, started or only submitted."""
    return (path / "launch" / "events.jsonl").exists() or (path / "metrics.jsonl").exists()
