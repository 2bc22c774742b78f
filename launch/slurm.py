"""What launchers ask SLURM, and the job script they hand it."""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from rondo.errors import UserError

ACTIVE = ("RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "CONFIGURING", "SIGNALING", "RESIZING")
"""States of jobs whose processes may exist."""
_ANSWER_SECONDS = 60.0


def call(*words: str, environment: Mapping[str, str] | None = None) -> str:
    """What a SLURM command prints. Raises UserError with what it says when it fails."""
    try:
        done = subprocess.run(
            words,
            capture_output=True,
            text=True,
            check=False,
            timeout=_ANSWER_SECONDS,
            env=environment,
        )
    except FileNotFoundError as error:
        raise UserError(f"{words[0]}: no such command; SLURM is not installed here") from error
    except subprocess.TimeoutExpired as error:
        raise UserError(f"{words[0]} did not answer within {_ANSWER_SECONDS:.0f} s") from error
    if done.returncode != 0:
        said = done.stderr.strip() or f"exit code {done.returncode}"
        raise UserError(f"{shlex.join(words)}: {said}")
    return done.stdout


def job_state(job: str) -> str | None:
    """State of a job, "" when SLURM knows of none that has not ended; None when SLURM does not
    answer."""
    try:
        return call("squeue", "--noheader", f"--jobs={job}", "--format=%T").strip()
    except UserError as error:
        return "" if "Invalid job id" in str(error) else None


def queue() -> dict[str, str]:
    """States of all jobs that have not ended, by id; empty where there is no SLURM."""
    try:
        lines = call("squeue", "--noheader", "--format=%i %T").splitlines()
    except UserError:
        return {}
    return dict(line.split() for line in lines)


def job_facts(job: str) -> dict[str, str]:
    """The `Key=value` pairs of `scontrol show job`."""
    words = call("scontrol", "--oneliner", "show", "job", job).split()
    return dict(word.split("=", 1) for word in words if "=" in word)


def host_names(nodes: str) -> list[str]:
    """The nodes of a list such as `n[1-3]`."""
    return call("scontrol", "show", "hostnames", nodes).split()


@dataclass(frozen=True)
class Script:
    """A job script: directives, environment and the command that it becomes."""

    directives: Sequence[str]
    """Options of sbatch."""
    environment: Mapping[str, str] = field(default_factory=dict)
    command: Sequence[Sequence[str]] = ()
    """Words of the command, in groups that are put on lines of their own."""

    def __str__(self) -> str:
        lines = ["#!/bin/bash", "# Written by `rondo launch slurm`."]
        lines += [f"#SBATCH {shlex.quote(_one_line(each))}" for each in self.directives]
        lines += [f"export {key}={shlex.quote(text)}" for key, text in self.environment.items()]
        lines.append("exec " + " \\\n    ".join(shlex.join(words) for words in self.command))
        return "\n".join(lines) + "\n"


def file_pattern(path: object) -> str:
    """A path for sbatch and srun, to which `%` is special."""
    return str(path).replace("%", "%%")


def _one_line(text: str) -> str:
    if any(not character.isprintable() for character in text):
        raise UserError(f"{text!r} cannot be an option of sbatch: it is not one line of text")
    return text


def submit(script: str, chain: int) -> list[str]:
    """Submits a script `chain` times, each to start after the one before has ended; returns the
    jobs' ids. If SLURM refuses one, none stays."""
    jobs: list[str] = []
    for words in submissions(script, chain):
        after = [word.replace("JOB", jobs[-1]) if jobs else word for word in words[:-1]]
        try:
            jobs.append(call(*after, words[-1]).strip().partition(";")[0])
        except UserError:
            if jobs:
                call("scancel", *jobs)
            raise
    return jobs


def submissions(script: str, chain: int) -> list[list[str]]:
    """The commands that submit a chain; JOB stands for the id that the one before prints."""
    first = ["sbatch", "--parsable", script]
    later = ["sbatch", "--parsable", "--dependency=afterany:JOB", script]
    return [first, *[later] * (chain - 1)]
