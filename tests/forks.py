"""Processes that are forks of one that has imported what takes seconds."""

from __future__ import annotations

import atexit
import multiprocessing as mp
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

FORKS = mp.get_context("forkserver")
"""Its server has imported these and nothing else: no thread runs in it."""
FORKS.set_forkserver_preload(
    [
        "rondo.parallel.build",
        "rondo.parallel.checkpoint",
        "rondo.parallel.engines.megatron_optimizer",
        "rondo.pretrain.optim",
        "rondo.tests.distributed.spawn",
        "torch.distributed.fsdp",
        "torch.distributed.pipelining",
    ]
)


def environment() -> dict[str, str]:
    """Of a command that runs this checkout on one thread of a CPU."""
    root = Path(__file__).parents[1]
    return {
        **os.environ,
        "PYTHONPATH": str(root / ".typing"),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }


class one_thread:
    """Processes started inside use one OpenMP thread each."""

    def __enter__(self) -> None:
        self._before = os.environ.get("OMP_NUM_THREADS")
        os.environ["OMP_NUM_THREADS"] = "1"

    def __exit__(self, *_: object) -> None:
        if self._before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = self._before


class Fork:
    """A process that calls `function(*args)`, which must be importable by name, in `folder`."""

    def __init__(
        self,
        folder: Path,
        function: Callable[..., Any],
        *args: Any,
        log: Path | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.log = log or folder / "fork.log"
        """What it prints, its errors too."""
        call = (folder, self.log, dict(environment or {}), function, args)
        self.process = FORKS.Process(target=_call, args=call)
        with one_thread():
            self.process.start()
        atexit.register(self.process.kill)  # before multiprocessing would wait for its end

    @property
    def pid(self) -> int:
        """Of the process."""
        assert self.process.pid is not None
        return self.process.pid

    def end(self, timeout: float = 240) -> int:
        """Waits; the exit code, -N after signal N.

        Raises:
            subprocess.TimeoutExpired: it has not ended after `timeout` seconds; it is killed.
        """
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            raise subprocess.TimeoutExpired(str(self.process), timeout, self.log.read_bytes())
        return self.process.exitcode


def _call(
    folder: Path,
    log: Path,
    environment: dict[str, str],
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    os.chdir(folder)
    os.environ.update(environment)
    with open(log, "ab") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    function(*args)


class Training:
    """`python -m rondo.pretrain *words` on `ranks` ranks, as torchrun would start them."""

    def __init__(self, folder: Path, ranks: int, *words: str) -> None:
        self.log = folder / f"output-{len([*folder.glob('output-*')])}.log"
        self.log.touch()
        shared = {"CUDA_VISIBLE_DEVICES": ""}
        if ranks > 1:
            shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
            shared |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
        self.ranks = []
        for rank in range(ranks):
            own = {} if ranks == 1 else {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            self.ranks.append(Fork(folder, pretrain, words, log=self.log, environment=shared | own))

    def kill(self) -> None:
        """With SIGKILL, all ranks."""
        for rank in self.ranks:
            rank.process.kill()
        for rank in self.ranks:
            rank.end()

    def end(self, timeout: float = 240) -> tuple[list[int], str]:
        """Waits; the exit codes of the ranks, and what they printed. See `Fork.end`."""
        codes = [rank.end(timeout) for rank in self.ranks]
        return codes, self.log.read_text()


def pretrain(words: Sequence[str]) -> None:
    """`python -m rondo.pretrain *words`."""
    from rondo.errors import run_command
    from rondo.pretrain.__main__ import main

    sys.exit(run_command(lambda: main(words)))


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]
