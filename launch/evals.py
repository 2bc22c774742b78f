"""`rondo evals watch`: scores the checkpoints of a run as they appear, from outside of it.

Training with `evals.tasks` starts the same on its first rank, so that what happens to a job is
never its business.
"""

from __future__ import annotations

import argparse
import ctypes
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from rondo.errors import UserError
from rondo.launch.container import inherit
from rondo.launch.eval_records import SETTLED, EvalRecord, checkpoint_steps, records
from rondo.launch.eval_start import Processes, SlurmJobs, Starter
from rondo.launch.folder import RunFolder, find_run
from rondo.launch.lock import Lock
from rondo.launch.options import parse_watch
from rondo.launch.supervise import say

_PR_SET_PDEATHSIG = 1
_POLL_SECONDS = {"process": 0.5, "slurm": 2.0}
_USAGE = """\
usage: rondo evals watch RUN --tasks A,B [--option value]...

Scores the checkpoints of a run. `rondo evals watch --help` lists the options."""


class Watcher:
    """Starts a job for every checkpoint that is due, and again where a job vanished.

    Args:
        folder: of the run.
        options: of `rondo evals watch`.
        starter: starts jobs; by default what `options.where` says.
    """

    def __init__(
        self, folder: RunFolder, options: argparse.Namespace, starter: Starter | None = None
    ) -> None:
        self.folder, self.options = folder, options
        by_name = {"process": Processes, "slurm": SlurmJobs}
        self.starter = starter or by_name[options.where](options)
        self.ending = False
        self._said = ""

    def run(self) -> None:
        """Watches until the last checkpoint of the run is scored, or a signal ends it: jobs of
        SLURM go on then, processes are ended, and what starts later finds all of it on record."""
        before = {n: signal.signal(n, self._stop) for n in (signal.SIGTERM, signal.SIGINT)}
        try:
            while not self.round() and not self.ending:
                time.sleep(_POLL_SECONDS[self.options.where])
            if self.ending and self.options.where == "slurm":
                self.round()  # the last checkpoint may have come with the signal
        finally:
            self.starter.end()
            for number, handler in before.items():
                signal.signal(number, handler)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.ending = True

    def round(self) -> bool:
        """Looks at every checkpoint once; returns whether nothing is left to do."""
        wanted = self._wanted()
        for record in wanted:
            try:
                self._look_after(record)
            except UserError as error:  # SLURM may answer the next time
                if str(error) != self._said:
                    say(f"step {record.step}: {error}")
                self._said = str(error)
        settled = [record for record in wanted if self._settled(record)]
        for record in settled:
            record.release()  # after the last hold: the job may have ended meanwhile
        steps = self.folder.steps()
        complete = steps is not None and steps in (record.step for record in wanted)
        return complete and all(each in settled or self._left_alone(each) for each in wanted)

    def _left_alone(self, record: EvalRecord) -> bool:
        """Whether training need not wait for a job: it is SLURM's."""
        slurm = self.options.child and self.options.where == "slurm"
        return slurm and bool(record.submitted.get("job"))

    def _wanted(self) -> list[EvalRecord]:
        """Records of the checkpoints that are due, those of earlier submissions included."""
        every, last = self.options.every, self.folder.steps()
        steps = {
            step
            for step in checkpoint_steps(self.folder.path)
            if step == last or (every and step % every == 0)
        }
        steps |= {record.step for record in records(self.folder.path) if record.submitted}
        run = self.folder.path.resolve()
        return [EvalRecord(run, step) for step in sorted(steps)]

    def _settled(self, record: EvalRecord) -> bool:
        job, missing = record.job, record.missing(self.options.tasks)
        if job.get("tasks") == self.options.tasks and job.get("state") in SETTLED:
            return job["state"] == "failed" or not missing
        # A job with all its results has still to say so.
        return not missing and not (record.submitted and self.starter.alive(record))

    def _look_after(self, record: EvalRecord) -> None:
        submitted = record.submitted
        if self._settled(record):
            return
        if submitted and self.starter.alive(record):
            record.hold()
            return
        number = submitted.get("number", 0) + 1 if self._same(submitted) else 1
        if not (record.checkpoint / "manifest.json").is_file():
            self._give_up(record, f"{record.checkpoint} was deleted before it was scored")
        elif number > self.options.retries + 1:
            self._give_up(record, f"{number - 1} jobs in a row ended without a word")
        else:
            record.hold()
            if self.starter.free() and not (self.ending and self.options.where == "process"):
                self.starter.start(record, number)
                say(f"step {record.step}: {self.options.where} {number} started")

    def _same(self, submitted: dict) -> bool:
        return submitted.get("tasks") == self.options.tasks

    def _give_up(self, record: EvalRecord, problem: str) -> None:
        say(f"step {record.step}: {problem}")
        record.write("job", state="failed", tasks=self.options.tasks, problem=problem)
        record.release()


def main(words: Sequence[str]) -> int:
    """Runs `rondo evals watch RUN`."""
    if not words or words[0] in ("-h", "--help"):
        print(_USAGE)
        return 0
    if words[0] != "watch":
        raise UserError(f"rondo evals: expected watch, got {words[0]!r}")
    try:
        options = parse_watch(words[1:])
    except SystemExit:  # after --help
        return 0
    if options.child:
        _end_with_parent()
    folder = RunFolder(Path(options.run)) if options.child else find_run(options.run)
    inherit(options, folder.container() if options.where == "slurm" else {})
    with Lock(folder.path / "evals" / "jobs" / "lock"):
        if not options.child:
            _forget_failures(folder)
        Watcher(folder, options).run()
    failed = [each for each in records(folder.path) if each.job.get("state") == "failed"]
    for record in failed:
        say(f"step {record.step} has no result: {record.job.get('problem')}")
    return 1 if failed else 0


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _forget_failures(folder: RunFolder) -> None:
    """Who types the command again wants what failed tried again."""
    for record in records(folder.path):
        if record.job.get("state") == "failed":
            for name in ("job", "submitted"):
                (record.folder / f"{name}.json").unlink(missing_ok=True)
