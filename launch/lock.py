"""The lock of a run folder: one launcher at a time, and a dead owner's lock does not hold."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import uuid
from pathlib import Path
from types import TracebackType
from typing import Any

from rondo.errors import UserError
from rondo.launch import slurm

HEARTBEAT_SECONDS = 30.0
STALE_SECONDS = 300.0
"""An owner elsewhere that no one can be asked about is dead after so long without a heartbeat."""


class Lock:
    """While in the `with` block, this process alone launches ranks in a run folder.

    The file holds host, process and SLURM job of the owner; its age is the time since the owner's
    last heartbeat.

    Args:
        path: the lock file.
        job: the SLURM job whose batch process this is.

    Raises:
        UserError: another launcher that is alive holds it.
    """

    def __init__(self, path: Path, job: str = "") -> None:
        self.path, self.job = path, job
        self._owner = _owner(job)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> Lock:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        own = self.path.with_name(f"lock.{uuid.uuid4().hex}")
        own.write_text(json.dumps(self._owner))
        try:
            while not _link(own, self.path):
                owner = read_owner(self.path)
                if owner is not None and is_alive(owner, self.path, self.job):
                    raise UserError(f"{self.path} is held by {describe(owner)}")
                if owner is not None and self._succeed(owner, own):
                    break
        finally:
            own.unlink(missing_ok=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._thread.join()
        if read_owner(self.path) == self._owner:  # not if it was taken for dead
            self.path.unlink()

    def _succeed(self, owner: dict[str, Any], own: Path) -> bool:
        """Puts `own` in the place of a dead owner's lock; False if another was faster."""
        token = self.path.with_name(f"lock.after-{owner['id']}")
        if not _link(own, token):  # of several that try, one may, and no other until it has
            raise UserError(f"another launcher is taking {self.path} over; if none is, rm {token}")
        try:
            if read_owner(self.path) != owner:
                return False
            own.replace(self.path)
            return True
        finally:
            token.unlink()

    def _beat(self) -> None:
        while not self._ended.wait(HEARTBEAT_SECONDS):
            with contextlib.suppress(OSError):
                os.utime(self.path)


def _link(source: Path, target: Path) -> bool:
    """Whether `target` did not exist and is `source` now; atomic on network file systems too."""
    try:
        os.link(source, target)
    except FileExistsError:
        return False
    return True


def read_owner(path: Path) -> dict[str, Any] | None:
    """Who holds the lock at `path`; None when nobody does."""
    try:
        owner = json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return owner if isinstance(owner, dict) else None


def is_alive(owner: dict[str, Any], path: Path, job: str = "") -> bool:
    """Whether the owner of the lock at `path` still runs; `job` is the SLURM job that asks."""
    if owner["host"] == socket.gethostname():
        started = _start_time(owner["pid"])
        return started is not None and started == owner["started"]  # else its number is another's
    if owner["job"]:
        if owner["job"] == job:
            return False  # a job that was requeued starts again after its end only
        state = slurm.job_state(owner["job"])
        if state is not None:
            return state in slurm.ACTIVE
    return _age(path) < STALE_SECONDS


def describe(owner: dict[str, Any]) -> str:
    """The owner in words."""
    job = f"SLURM job {owner['job']}, " if owner["job"] else ""
    return f"{job}process {owner['pid']} on {owner['host']}"


def _owner(job: str) -> dict[str, Any]:
    return {
        "id": uuid.uuid4().hex,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": _start_time(os.getpid()),
        "job": job,
    }


def _start_time(pid: int) -> int | None:
    """When a process started, in ticks since boot; None when there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] == "Z" else int(fields[19])


def _age(path: Path) -> float:
    """Seconds since the last heartbeat, by the clock of the file system that holds it."""
    probe = path.with_name(f"lock.{uuid.uuid4().hex}")
    probe.touch()
    now = probe.stat().st_mtime
    probe.unlink()
    try:
        return now - path.stat().st_mtime
    except FileNotFoundError:
        return float("inf")
