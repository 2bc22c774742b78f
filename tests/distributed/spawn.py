"""Runs a function on several gloo ranks on this machine."""

from __future__ import annotations

import multiprocessing as mp
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

from rondo.tests.forks import FORKS, one_thread


def run_ranks(
    function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120.0
) -> list[Any]:
    """Calls `function(*args)` on `world_size` processes with a gloo process group.

    Args:
        function: must be importable by name (no lambda or nested function).
        world_size: number of ranks.
        args: handed to every rank; must pickle.
        timeout: seconds until all ranks must have ended.

    Returns:
        The results by rank.

    Raises:
        AssertionError: a rank raised (with its traceback), died or did not end in time; the
            other ranks are killed.
    """
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(world_size):
            receive, send = FORKS.Pipe(duplex=False)
            process = FORKS.Process(
                target=_rank,
                args=(send, function, rank, world_size, f"file://{folder}/store", timeout, args),
            )
            with one_thread():
                process.start()
            send.close()
            pipes.append(receive)
            processes.append(process)
        try:
            return _collect(pipes, time.monotonic() + timeout)
        finally:
            for process in processes:
                process.kill()
                process.join()


def _collect(pipes: list[Connection], deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    failures: dict[int, str] = {}
    waiting = dict(enumerate(pipes))
    while waiting and not failures:
        left = deadline - time.monotonic()
        ready = mp.connection.wait(list(waiting.values()), timeout=max(0.0, left))
        if not ready:
            raise AssertionError(f"ranks {sorted(waiting)} did not end in time")
        for rank in [r for r, pipe in waiting.items() if pipe in ready]:
            try:
                ok, value = pickle.loads(waiting.pop(rank).recv_bytes())
            except EOFError:
                ok, value = False, "died without a word (killed, or a crash in native code)"
            (results if ok else failures)[rank] = value
    if failures:
        text = "\n".join(f"rank {rank}: {failures[rank]}" for rank in sorted(failures))
        raise AssertionError(text)
    return [results[rank] for rank in sorted(results)]


def _rank(
    pipe: Connection,
    function: Callable[..., Any],
    rank: int,
    world_size: int,
    store: str,
    timeout: float,
    args: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            init_method=store,
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout),
        )
        result = function(*args)
        dist.barrier()
        # By value: what a pipe shares of a tensor would go with the process.
        pipe.send_bytes(pickle.dumps((True, result)))
        dist.destroy_process_group()
    except BaseException:
        pipe.send_bytes(pickle.dumps((False, traceback.format_exc())))
