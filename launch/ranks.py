"""Ranks on this machine, started one by one or by torchrun."""

from __future__ import annotations

import contextlib
import os
import random
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from rondo.errors import UserError
from rondo.launch.supervise import DONE, STOPPED

LINGER_SECONDS = 60.0
"""How long ranks may go on when one has ended in good order: it may wait for a checkpoint."""
LAST_WORDS_SECONDS = 15.0
"""How long ranks may go on when one has failed: others explain themselves 10 s later."""

_WORKER = (sys.executable, "-m", "rondo.launch.worker")


def free_port() -> int:
    """A TCP port that is free now, below those that Linux gives to connections: ranks open it
    seconds later, and until then another program would soon be given one of these."""
    for port in random.SystemRandom().sample(range(16384, 32768), 1000):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port
    raise UserError("launch: no free TCP port between 16384 and 32767")


def as_exit_code(code: int) -> int:
    """What a shell makes of `Popen.returncode`: 128 + n after signal n."""
    return 128 - code if code < 0 else code


def worker(logs: object, command: Sequence[str], *options: str) -> list[str]:
    """The command that runs a module as a rank with a log of its own."""
    return [*_WORKER, f"--logs={logs}", *options, *command]


def rank_environment(rank: int, size: int, port: int) -> dict[str, str]:
    """How one of `size` ranks on this machine finds the others."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


class LocalRanks:
    """`size` ranks on this machine, each a child of this process."""

    def __init__(
        self, command: Sequence[str], size: int, logs: Path, environment: Mapping[str, str]
    ) -> None:
        port = free_port()
        self.processes = [
            subprocess.Popen(
                worker(logs, command),
                env={**os.environ, **environment, **rank_environment(rank, size, port)},
                start_new_session=True,  # Ctrl-C is for this process to pass on
            )
            for rank in range(size)
        ]
        self._first: int | None = None
        self._deadline = float("inf")

    def poll(self) -> int | None:
        codes = [process.poll() for process in self.processes]
        ended = [code for code in codes if code is not None]
        bad = [code for code in ended if code not in (DONE, STOPPED)]
        if bad and self._first is None:
            self._first = bad[0]
            self._deadline = time.monotonic() + LAST_WORDS_SECONDS
        elif ended and self._deadline == float("inf"):
            self._deadline = time.monotonic() + LINGER_SECONDS
        if len(ended) < len(codes):
            if time.monotonic() > self._deadline:
                self.kill()
            return None
        return as_exit_code(self._first if self._first is not None else max(ended))

    def stop(self) -> None:
        for process in self.processes:
            process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        for process in self.processes:
            process.kill()


class TorchrunRanks:
    """The ranks of this machine under torchrun, which meets those of other machines.

    torchrun passes no SIGUSR1 on, ends ranks 30 seconds after SIGTERM, and has no exit code but 1
    for all that can happen to them: signals go to the ranks directly, and codes come in files.

    Args:
        options: torchrun's.
        command: what each rank runs: a module and its words.
        logs: folder of a log for each rank.
        environment: variables to add.
    """

    def __init__(
        self,
        options: Sequence[str],
        command: Sequence[str],
        logs: Path,
        environment: Mapping[str, str],
    ) -> None:
        self._files = tempfile.TemporaryDirectory(prefix="rondo-")
        self.folder = Path(self._files.name)
        self.process = subprocess.Popen(
            torchrun(options, worker(logs, command, f"--codes={self.folder}")),
            env={**os.environ, **environment},
            start_new_session=True,
        )

    def poll(self) -> int | None:
        code = self.process.poll()
        if code is None:
            return None
        codes = [int(path.read_text()) for path in self.folder.glob("*.code")]
        self._files.cleanup()
        if code == DONE:
            return max(codes, default=DONE)  # a rank that stopped tells torchrun 0
        bad = [each for each in codes if each not in (DONE, STOPPED)]
        return min(bad, default=as_exit_code(code))

    def stop(self) -> None:
        for pid in self._workers():
            _send(pid, signal.SIGTERM)

    def kill(self) -> None:
        for pid in self._workers():
            _send(pid, signal.SIGKILL)
        self.process.kill()

    def _workers(self) -> list[int]:
        """Ranks that have started and not ended."""
        running = {path.stem for path in self.folder.glob("*.pid")}
        running -= {path.stem for path in self.folder.glob("*.code")}
        return [int((self.folder / f"{rank}.pid").read_text()) for rank in running]


def torchrun(options: Sequence[str], rank: Sequence[str]) -> list[str]:
    """torchrun's command line."""
    program = [*_WORKER, "torch.distributed.run", "--max-restarts=0", *options, "-m"]
    return [*program, "--", *rank[2:]]  # else torchrun takes some of the rank's options for its own


def _send(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def shell(words: Sequence[str], environment: Mapping[str, str]) -> str:
    """A command with the variables it gets, as a line for a shell."""
    pairs = [f"{key}={shlex.quote(text)}" for key, text in environment.items()]
    return " ".join([*pairs, shlex.join(words)])
