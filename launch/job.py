"""The batch process of a SLURM job: `python -m rondo.launch.job ... -- srun WORDS`.

Locks the run folder, has every node checked, starts the ranks with srun, hands signals on to them,
and requeues the job when they stopped after a checkpoint or a node is bad.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from rondo.errors import UserError, run_command
from rondo.launch import slurm
from rondo.launch.folder import FINAL, RunFolder
from rondo.launch.lock import Lock
from rondo.launch.ranks import as_exit_code, free_port
from rondo.launch.supervise import STOPPED, STOPS, Outcome, Supervisor, say

_HEALTH_SECONDS = 180.0
_SILENT = "no answer to the health check"


class Job:
    """This SLURM job.

    Args:
        options: what `main` parses.
        srun: the command that starts the ranks.
    """

    def __init__(self, options: argparse.Namespace, srun: Sequence[str]) -> None:
        self.options, self.srun = options, list(srun)
        self.folder = RunFolder(options.folder)
        self.id = os.environ["SLURM_JOB_ID"]
        self.restarts = os.environ.get("SLURM_RESTART_COUNT", "0")
        self.nodes = slurm.host_names(os.environ["SLURM_JOB_NODELIST"])
        self.master = _reachable_name()
        self.supervisor = Supervisor(
            self.folder,
            options.launch,
            self._begin,
            retries=options.retries,
            job=self.id,
            restarts=int(self.restarts),
            nodes=self.nodes,
        )

    def run(self) -> int:
        """Runs the job to its end; returns its exit code."""
        known = self.folder.outcome(self.options.launch)
        if self.folder.stop_file.exists():
            known = "stopped"
        if known in FINAL:
            say(f"this launch has ended already ({known}): nothing to do")
            return 0
        with Lock(self.folder.launch / "lock", self.id):
            outcome = self.supervisor.run()
        if outcome.name == "interrupted":
            self._go_on()
        return outcome.code

    def _begin(self) -> SrunRanks | Outcome:
        bad = self._bad_nodes()
        if bad:
            return self._without(bad)
        logs = self.folder.new_logs(f"{self.id}.{self.restarts}")
        environment = {"MASTER_ADDR": self.master, "MASTER_PORT": str(free_port())}
        return SrunRanks(self.id, self.srun, logs, environment)

    def _bad_nodes(self) -> dict[str, str]:
        """What is wrong with which node."""
        words = [f"--folder={self.folder.path}", f"--gpus={self.options.gpus}"]
        words += [f"--memory={self.options.memory}", f"--master={self.master}"]
        count = len(self.nodes)
        srun = ["srun", f"--nodes={count}", f"--ntasks={count}", "--ntasks-per-node=1"]
        check = [*srun, sys.executable, "-m", "rondo.launch.health", *words]
        with subprocess.Popen(check, stdout=subprocess.PIPE, text=True) as process:
            try:
                said, _ = process.communicate(timeout=_HEALTH_SECONDS)
            except subprocess.TimeoutExpired:
                process.terminate()
                said, _ = process.communicate()
        found = dict(line.split("\t", 1) for line in said.splitlines() if "\t" in line)
        answers = {node: found.get(node, _SILENT) for node in self.nodes}
        return {node: answer for node, answer in answers.items() if answer != "healthy"}

    def _without(self, bad: dict[str, str]) -> Outcome:
        """What to do about bad nodes: go on without them, unless they are all or too many."""
        if self.supervisor.signals:
            return Outcome("interrupted", STOPPED)  # the signal ended the check
        launch, saved = self.options.launch, self.folder.saved_step()
        if set(bad.values()) == {_SILENT} and len(bad) == len(self.nodes):
            bad = {}  # rather srun's fault than theirs
        self.folder.record("bad nodes", launch=launch, nodes=bad, saved=saved)
        named = "; ".join(f"{node}: {problem}" for node, problem in bad.items())
        named = named or "srun could not check any node"
        if len(bad) == len(self.nodes) > 1:
            return Outcome("failed", 1, f"every node failed its health check: {named}")
        before = [row for row in self.folder.events("bad nodes", launch) if row["saved"] == saved]
        if len(before) > self.options.retries:
            return Outcome("failed", 1, f"bad nodes in {len(before)} starts in a row: {named}")
        return Outcome("interrupted", STOPPED, f"to go on without bad nodes: {named}")

    def _go_on(self) -> None:
        """Sees to it that the run goes on: this job again, or the next one of its chain."""
        for number in STOPS:  # requeueing sends the first
            signal.signal(number, signal.SIG_IGN)
        later = [job for job in self.folder.jobs(self.options.launch) if int(job) > int(self.id)]
        if self.options.requeue and self._may_requeue():
            slurm.call("scontrol", "requeue", self.id)
            later = [self.id]
            self.folder.record("requeue", launch=self.options.launch, job=self.id)
        rows = self.folder.events("bad nodes", self.options.launch)
        bad = sorted({node for row in rows for node in row["nodes"]})
        # What was excluded may have commas within brackets, which SLURM understands.
        before = [self.options.exclude] if self.options.exclude else []
        nodes = ",".join([*before, *bad])
        for job in later if bad else ():
            try:
                slurm.call("scontrol", "update", f"JobId={job}", f"ExcNodeList={nodes}")
            except UserError as error:  # it may get them again, and finds them bad again
                say(f"job {job} is not kept from {', '.join(bad)}: {error}")

    def _may_requeue(self) -> bool:
        """Not when someone cancelled the job, or SLURM is requeueing it already."""
        facts = slurm.job_facts(self.id)
        return facts["JobState"] == "RUNNING" or facts["Reason"] == "TimeLimit"


class SrunRanks:
    """The ranks of a job, as one step of it."""

    def __init__(
        self, job: str, srun: Sequence[str], logs: Path, environment: dict[str, str]
    ) -> None:
        self.job = job
        output = f"--output={slurm.file_pattern(logs)}/rank-%3t.log"
        self.process = subprocess.Popen(
            [srun[0], output, *srun[1:]], env={**os.environ, **environment}
        )
        self._asking: subprocess.Popen[bytes] | None = None

    def poll(self) -> int | None:
        code = self.process.poll()
        if code is None:
            return None
        if self._asking is not None:
            self._asking.kill()  # or it would go on asking the next start
        return as_exit_code(code)

    def stop(self) -> None:
        # It signals steps, not this process. Nobody waits for it: where SLURM is ending the job,
        # which it tells the ranks itself, it tries again for minutes.
        if self._asking is None or self._asking.poll() is not None:
            self._asking = subprocess.Popen(["scancel", "--signal=TERM", self.job])

    def kill(self) -> None:
        self.process.terminate()


def _reachable_name() -> str:
    """The name under which other nodes reach this one, where rank 0 runs."""
    node = os.environ.get("SLURMD_NODENAME", "")
    try:
        socket.getaddrinfo(node, None)
    except OSError:
        return socket.gethostname()
    return node


def main(argv: Sequence[str]) -> int:
    """The command; see the module."""
    parser = argparse.ArgumentParser(prog="python -m rondo.launch.job", description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="run folder")
    parser.add_argument("--launch", required=True, help="id that the jobs of a launch share")
    parser.add_argument("--retries", type=int, default=3, help="failures in a row to bear")
    parser.add_argument("--requeue", action="store_true", help="requeue this job to go on")
    parser.add_argument("--exclude", default="", help="nodes the job was told to avoid")
    parser.add_argument("--gpus", type=int, default=0, help="GPUs a node must have")
    parser.add_argument("--memory", type=float, default=0.0, help="GiB a node must have free")
    split = list(argv).index("--")
    return Job(parser.parse_args(argv[:split]), argv[split + 1 :]).run()


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(sys.argv[1:])))
