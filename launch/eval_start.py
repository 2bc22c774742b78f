"""How the job that scores a checkpoint is started: as a process of this machine, or by SLURM."""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
from pathlib import Path
from typing import Any, Protocol

from rondo.launch import slurm
from rondo.launch.container import interpreter, srun_options
from rondo.launch.eval_records import EvalRecord
from rondo.launch.slurm import Script, file_pattern

_OF_RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Starter(Protocol):
    """Starts jobs, and knows which of them still run or wait."""

    def free(self) -> bool:
        """Whether one more may be started now."""

    def start(self, record: EvalRecord, number: int) -> None:
        """Starts a job, and records it as submission `number`."""

    def alive(self, record: EvalRecord) -> bool:
        """Whether the last job of a record may still bring a result."""

    def end(self) -> None:
        """Ends what dies with this process."""


def job_command(record: EvalRecord, options: argparse.Namespace) -> list[str]:
    """The words of a job."""
    words = [*interpreter(options), "-m", "rondo.launch.eval_job", str(record.run)]
    words += [f"--step={record.step}"]
    words += [f"--tasks={','.join(options.tasks)}", f"--retries={options.retries}"]
    words += [f"--processes={options.gpus}"] * (options.gpus > 1) + ["--"]
    for name in ("limit", "batch_size", "data_dir", "text", "samples", "seed"):
        if value := getattr(options, name):
            words += [f"--{name}", str(value)]
    return words


def environment() -> dict[str, str]:
    """That of this process without what makes it a rank or a step of a SLURM job."""
    own = {key: text for key, text in os.environ.items() if key not in _OF_RANKS}
    return {k: v for k, v in own.items() if not k.startswith("SLURM_") or k == "SLURM_CONF"}


class Processes:
    """One job after the other, each a child of this process."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self._step = -1
        self._process: subprocess.Popen[bytes] | None = None

    def free(self) -> bool:
        return self._process is None or self._process.poll() is not None

    def start(self, record: EvalRecord, number: int) -> None:
        record.write("submitted", number=number, tasks=self.options.tasks, where="process")
        with (record.folder / "job.log").open("ab") as log:
            self._process = subprocess.Popen(
                ["nice", "-n", "10", *job_command(record, self.options)],  # training goes first
                env=environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._step = record.step

    def alive(self, record: EvalRecord) -> bool:
        return record.step == self._step and not self.free()

    def end(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            self._process.wait()


class SlurmJobs:
    """A SLURM job a checkpoint."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options

    def free(self) -> bool:
        return True

    def start(self, record: EvalRecord, number: int) -> None:
        facts: dict[str, Any] = {"number": number, "tasks": self.options.tasks, "where": "slurm"}
        record.write("submitted", job="", **facts)
        script = record.folder / "job.sh"
        script.write_text(str(eval_script(record, self.options)))
        # SLURM's own variables of the job that trains are not for this one.
        said = slurm.call("sbatch", "--parsable", str(script), environment=environment())
        job = said.strip().partition(";")[0]
        record.write("submitted", job=job, **facts)

    def alive(self, record: EvalRecord) -> bool:
        submitted = record.submitted
        job = submitted["job"]
        if not job:  # this process's predecessor died while it submitted
            found = slurm.call("squeue", "--noheader", f"--name={job_name(record)}", "--format=%i")
            if not found.split():
                return False
            job = found.split()[0]
            record.write("submitted", **{**submitted, "job": job})
        return slurm.job_state(job) != ""  # None, no answer, is no reason to start another

    def end(self) -> None:
        pass


def job_name(record: EvalRecord) -> str:
    """Name of a record's jobs, which no other run has."""
    digest = hashlib.sha256(os.fsencode(Path(record.run).resolve())).hexdigest()[:8]
    return f"eval-{digest}-{record.step}"


def eval_script(record: EvalRecord, options: argparse.Namespace) -> Script:
    """The script of a SLURM job."""
    given = {
        "job-name": job_name(record),
        "partition": options.partition,
        "account": options.account,
        "qos": options.qos,
        "time": options.time,
        "gpus": options.gpus or None,
        "cpus-per-task": options.cpus,
        "nodes": 1,
        "ntasks": 1,
        "output": f"{file_pattern(record.folder)}/job.log",
        "open-mode": "append",
    }
    words = [f"--{key}={value}" for key, value in given.items() if value is not None]
    threads = {}
    if options.cpus:
        threads["OMP_NUM_THREADS"] = str(max(1, options.cpus // max(1, options.gpus)))  # of a rank
    command = [job_command(record, options)]
    if contained := srun_options(options):
        command.insert(0, ["srun", "--nodes=1", "--ntasks=1", *contained])
        if options.cpus:
            threads["SRUN_CPUS_PER_TASK"] = str(options.cpus)
    return Script([*words, "--requeue", *options.sbatch], threads, command)
