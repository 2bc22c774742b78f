"""Checkpoints scored beside training, as `evals.tasks` asks.

The first rank starts one process, `rondo evals watch`, and that one starts, repeats and records the
jobs. Training itself only says which checkpoints must stay until they are scored.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from rondo.errors import UserError
from rondo.parallel.checkpoint import files
from rondo.parallel.mesh import Ranks
from rondo.parallel.signals import StopFlag
from rondo.pretrain.data.corpora import open_corpus
from rondo.pretrain.data.errors import DataError
from rondo.pretrain.recipe import Recipe
from rondo.pretrain.stages import total_steps

_POLL_SECONDS = 0.5
_SUBMIT_SECONDS = 120.0
"""How long the end of a run waits for the submission of its last job."""
_END_SECONDS = 10.0


def require_files(recipe: Recipe) -> None:
    """Raises UserError where local files that `evals` names for its tasks are not there: scoring
    would only say so beside the first checkpoint."""
    config = recipe.evals
    if not config.tasks:
        return
    if config.data_dir is not None and not Path(config.data_dir).expanduser().is_dir():
        raise UserError(f"evals.data_dir: {config.data_dir} is no folder (seen from {Path.cwd()})")
    try:
        if config.text is not None:
            open_corpus(config.text)
    except DataError as error:
        raise UserError(f"evals.text: {error}") from error


class EvalJobs:
    """The scoring of a run's checkpoints. Every rank calls its methods alike; the first acts.

    Args:
        recipe: without `evals.tasks`, nothing is done.
        folder: the run folder.
        ranks: all ranks.
        stop: raised when training has to end soon.
    """

    def __init__(self, recipe: Recipe, folder: Path, ranks: Ranks, stop: StopFlag) -> None:
        self.config, self.steps, self.folder = recipe.evals, total_steps(recipe), folder
        self.ranks, self.stop = ranks, stop
        self.active = bool(recipe.evals.tasks)
        self.seconds = 0.0
        """What training has lost to them in this process."""
        self._reported = 0.0
        self._process: subprocess.Popen[bytes] | None = None

    def due(self, done: int) -> bool:
        """Whether the checkpoint after `done` steps is to be scored."""
        every = self.config.every
        return self.active and (done == self.steps or (every > 0 and done % every == 0))

    def start(self) -> None:
        """Starts to watch the run folder, where nothing does or what did has died."""
        if not self.active or self.ranks.rank > 0 or self._running:
            return
        began = time.perf_counter()
        jobs = self.folder / "evals" / "jobs"
        jobs.mkdir(parents=True, exist_ok=True)
        with (jobs / "watch.log").open("ab") as log:
            self._process = subprocess.Popen(
                self._command(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for this process to pass on
            )
        self.seconds += time.perf_counter() - began

    def hold(self, done: int) -> None:
        """Keeps the checkpoint after `done` steps, about to be written, until it is scored."""
        if self.ranks.rank == 0 and self.due(done):
            files.hold(self.folder / "checkpoints", done)

    def charge(self, save: Callable[[], None]) -> None:
        """Saves a checkpoint that nothing but its scoring asks for: that is time lost, too."""
        began = time.perf_counter()
        save()
        self.seconds += time.perf_counter() - began

    def wait(self, done: int) -> None:
        """In the loop (`evals.where`), waits for the results of the checkpoint after `done`
        steps, which is in place; a signal ends the wait."""
        self.start()
        if self.config.where == "loop" and self.due(done):
            self._until(lambda: self._settled(done) or not self._running)

    def metrics(self) -> dict[str, float]:
        """Seconds that training has lost since the last call."""
        if not self.active:
            return {}
        lost, self._reported = self.seconds - self._reported, self.seconds
        return {"eval_seconds": lost}

    def close(self, *, done: bool) -> bool:
        """Leaves the jobs of SLURM to SLURM. Processes have the time they need if the run is
        `done`; else they are ended, and go on with the run.

        Returns whether a signal ended them although the run is done."""
        cut = False
        if done and self.active:
            limit = _SUBMIT_SECONDS if self.config.where == "slurm" else math.inf
            cut = self._until(lambda: not self._running, limit)
        if self._process is not None and self._running:
            self._process.terminate()
            try:
                self._process.wait(_END_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        return cut

    @property
    def _running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def _until(self, ready: Callable[[], bool], limit: float = math.inf) -> bool:
        """Waits until the first rank is `ready`, `limit` seconds have passed or a signal came;
        returns whether it was a signal. Ranks meet twice a second, so that no collective of the
        others times out."""
        began = time.perf_counter()
        while True:
            over = self.ranks.rank == 0 and (ready() or time.perf_counter() - began > limit)
            over, stopped = self.ranks.sum(float(over), float(self.stop.raised))
            if over or stopped:
                self.seconds += time.perf_counter() - began
                return not over
            time.sleep(_POLL_SECONDS)

    def _settled(self, done: int) -> bool:
        evals, name = self.folder / "evals", f"step-{done:09d}"
        if all((evals / name / f"{task}.json").is_file() for task in self.config.tasks):
            return True
        try:
            job = json.loads((evals / "jobs" / name / "job.json").read_text())
        except FileNotFoundError:
            return False
        return job["state"] == "failed"

    def _command(self) -> list[str]:
        config, slurm = self.config, self.config.slurm
        where = "slurm" if config.where == "slurm" else "process"
        words = [sys.executable, "-m", "rondo.launch.cli", "evals", "watch", str(self.folder)]
        words += ["--child", f"--tasks={','.join(config.tasks)}", f"--where={where}"]
        words += [f"--every={config.every}", f"--retries={config.retries}"]
        given = {"limit": config.limit, "batch-size": config.batch_size}
        given |= {"data-dir": config.data_dir, "text": config.text}
        given |= {"samples": config.samples, "seed": config.seed}
        if where == "slurm":
            given |= {"partition": slurm.partition, "account": slurm.account, "qos": slurm.qos}
            given |= {"time": slurm.time, "gpus": slurm.gpus, "cpus": slurm.cpus}
            given |= {"container": slurm.container, "runtime": slurm.runtime}
            given |= {"python": slurm.python}
            words += [f"--sbatch={option}" for option in slurm.sbatch]
            words += [f"--mount={folder}" for folder in slurm.mount]
        return [*words, *(f"--{key}={value}" for key, value in given.items() if value)]
