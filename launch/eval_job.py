"""A job that scores one checkpoint: `python -m rondo.launch.eval_job RUN --step N --tasks A,B`.

Runs `rondo eval`, with the words behind `--` added, again after a failure, and records what came of
it. A task that has a result is not computed again, so a job that was killed half way loses one task
at most.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from rondo.errors import run_command
from rondo.launch.eval_records import EvalRecord
from rondo.launch.lock import Lock
from rondo.launch.ranks import LocalRanks
from rondo.launch.supervise import BAD_INPUT, STOPPED, say

COMMAND = "RONDO_EVAL_COMMAND"
"""Environment variable with the command that is run instead of `rondo eval`, for tests."""
HOLD_SECONDS = 30.0
"""How often a job says that it still reads its checkpoint."""
_MODULE = "rondo.evals.run"
_POLL_SECONDS = 0.1


def main(argv: Sequence[str]) -> int:
    """The command; see the module. 0: scored; 75: a signal ended it; other codes: it failed."""
    parser = argparse.ArgumentParser(prog="python -m rondo.launch.eval_job", description=__doc__)
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--step", type=int, required=True, help="of the checkpoint")
    parser.add_argument("--tasks", required=True, help="with commas between them")
    parser.add_argument("--retries", type=int, default=2, help="failures to bear")
    parser.add_argument("--processes", type=int, default=1, help="ranks, which share the samples")
    at = [*argv, "--"].index("--")  # what follows is for `rondo eval`
    options = parser.parse_args(argv[:at])
    record = EvalRecord(options.run, options.step)
    with Lock(record.folder / "lock", os.environ.get("SLURM_JOB_ID", "")):
        if record.job.get("state") == "done" and not record.missing(options.tasks.split(",")):
            return 0
        return _Scoring(record, options, argv[at + 1 :]).run()


class _Process(subprocess.Popen[bytes]):
    """All there is where ranks do not share the samples."""

    def stop(self) -> None:
        self.terminate()


class _Scoring:
    def __init__(
        self, record: EvalRecord, options: argparse.Namespace, words: Sequence[str]
    ) -> None:
        self.record, self.retries = record, options.retries
        self.tasks = options.tasks.split(",")
        start = os.environ.get(COMMAND)
        ours = [sys.executable, "-m", _MODULE]
        self.command = [*(shlex.split(start) if start else ours), str(record.run)]
        self.command += ["--step", str(record.step), "--tasks", options.tasks, *words]
        self.processes = options.processes
        self.stopping = False

    def run(self) -> int:
        """Tries until there is a result of every task, or no hope of one."""
        before = {n: signal.signal(n, self._stop) for n in (signal.SIGTERM, signal.SIGINT)}
        try:
            return self._try()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _try(self) -> int:
        began = time.monotonic()
        for attempt in range(1, self.retries + 2):
            facts: dict[str, Any] = {"attempts": attempt, "job": os.environ.get("SLURM_JOB_ID", "")}
            self.record.write("job", state="running", tasks=self.tasks, **facts)
            code, problem = self._attempt()
            if self.stopping:
                return STOPPED  # still "running" on record: whoever watches starts it again
            facts["seconds"] = time.monotonic() - began
            if not problem:
                break
            say(f"step {self.record.step}, attempt {attempt}: {problem}")
            if code == BAD_INPUT:
                break
        state = "failed" if problem else "done"
        self.record.write("job", state=state, tasks=self.tasks, problem=problem, **facts)
        self.record.release()
        return (code or 1) if problem else 0

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.stopping = True

    def _attempt(self) -> tuple[int, str]:
        """Exit code of the command, and what is wrong, if anything."""
        if not (self.record.checkpoint / "manifest.json").is_file():
            return BAD_INPUT, f"{self.record.checkpoint} is not there (any more)"
        held = float("-inf")
        ranks = self._start()
        while (code := ranks.poll()) is None:
            if self.stopping:
                ranks.stop()
            if time.monotonic() - held > HOLD_SECONDS:
                self.record.hold()
                held = time.monotonic()
            time.sleep(_POLL_SECONDS)
        if self.stopping:
            return code, "stopped"
        if code != 0:
            return code, f"`{shlex.join(self.command)}` ended with exit code {code}"
        if missing := self.record.missing(self.tasks):
            return 1, f"no result of {', '.join(missing)} in {self.record.results}"
        return 0, ""

    def _start(self) -> LocalRanks | _Process:
        if self.processes == 1:
            return _Process(self.command)
        words, logs = self.command[self.command.index(_MODULE) :], self.record.folder / "ranks"
        logs.mkdir(exist_ok=True)
        return LocalRanks(words, self.processes, logs, {})


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(sys.argv[1:])))
