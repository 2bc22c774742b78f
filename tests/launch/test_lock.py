"""The lock of a run folder holds while its owner lives, wherever that is, and no longer."""

from __future__ import annotations

import json
import multiprocessing as mp
import os
import socket
import time
from pathlib import Path

import pytest

from rondo.errors import UserError
from rondo.launch.lock import STALE_SECONDS, Lock, is_alive, read_owner


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "launch" / "lock"


def put(path: Path, **changed: object) -> dict:
    """A lock file of this process, but for what is `changed`."""
    path.parent.mkdir(exist_ok=True)
    with Lock(path):
        owner = {**(read_owner(path) or {}), **changed}
    path.write_text(json.dumps(owner))
    return owner


def put_squeue(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    tool = folder / "squeue"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")


def test_one_at_a_time(path: Path) -> None:
    with Lock(path):
        with pytest.raises(UserError, match=rf"held by process {os.getpid()} on "), Lock(path):
            pass
        assert read_owner(path)["pid"] == os.getpid()
    assert list(path.parent.iterdir()) == []
    with Lock(path):
        pass


def test_a_killed_owner_does_not_hold_it(path: Path) -> None:
    child = os.fork()
    if child == 0:
        Lock(path).__enter__()
        os._exit(9)
    os.waitpid(child, 0)
    assert read_owner(path)["pid"] == child
    with Lock(path):
        assert read_owner(path)["pid"] == os.getpid()


def test_nor_does_a_process_with_the_number_of_the_owner(path: Path) -> None:
    owner = put(path)
    assert is_alive(owner, path)
    assert not is_alive({**owner, "started": owner["started"] - 1}, path)


@pytest.mark.parametrize(
    ("says", "alive"),
    [
        ("echo RUNNING", True),
        ("echo COMPLETING", True),
        ("echo PENDING", False),  # requeued: it will ask for the lock when it starts
        ("", False),  # ended
        ("echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1", False),
        ("echo 'Unable to contact slurm controller' >&2; exit 1", True),  # its heart beats
    ],
)
def test_of_a_job_elsewhere_slurm_knows(
    says: str, alive: bool, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_squeue(tmp_path, monkeypatch, says)
    owner = put(path, host="elsewhere", job="7")
    assert is_alive(owner, path) == alive
    assert not is_alive(owner, path, "7")  # the job itself, started again on another node


def test_of_others_the_heartbeat_tells(path: Path) -> None:
    owner = put(path, host="elsewhere")
    assert is_alive(owner, path)
    then = time.time() - STALE_SECONDS - 1
    os.utime(path, (then, then))
    assert not is_alive(owner, path)
    with Lock(path):
        assert read_owner(path)["host"] == socket.gethostname()


def test_the_owner_shows_that_it_lives(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rondo.launch.lock.HEARTBEAT_SECONDS", 0.01)
    with Lock(path):
        os.utime(path, (0, 0))
        deadline = time.monotonic() + 10
        while path.stat().st_mtime == 0:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def _take_and_die(path: Path, inside: Path) -> int:
    """0: held the lock; 1: was refused; 2: was not alone."""
    try:
        Lock(path).__enter__()
        inside.mkdir()  # fails if another is inside
        inside.rmdir()
    except UserError:
        return 1
    except OSError:
        return 2
    return 0


def _take_often(path: Path, inside: Path, results: mp.Queue) -> None:
    codes = []
    for _ in range(60):
        child = os.fork()
        if child == 0:
            os._exit(_take_and_die(path, inside))
        codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    results.put(codes)


def test_of_several_that_find_a_dead_owner_one_takes_over(path: Path, tmp_path: Path) -> None:
    context = mp.get_context("fork")
    results = context.Queue()
    args = (path, tmp_path / "inside", results)
    children = [context.Process(target=_take_often, args=args) for _ in range(4)]
    for child in children:
        child.start()
    codes = [code for _ in children for code in results.get(timeout=30)]
    for child in children:
        child.join()
    assert set(codes) <= {0, 1}
    assert codes.count(0) > 20
