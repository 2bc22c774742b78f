"""One builder for a folder, however many processes want it; the folder appears whole or not."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rondo.pretrain.data.errors import DataError

PATIENCE_SECONDS = 2.0


@contextmanager
def build_lock(output: Path) -> Iterator[Path]:
    """Hold the right to build `output`; yields its scratch folder, `<output>.building`.

    The lock is the kernel's (flock), so a dead owner holds nothing. What is in the scratch
    folder survives a crash, for the next builder to go on from.
    """
    scratch = output.with_name(output.name + ".building")
    with no_empty_folders(output.parent):
        lock = _acquire(scratch, output)
        try:
            yield scratch
        finally:
            os.close(lock)


@contextmanager
def no_empty_folders(folder: Path) -> Iterator[None]:
    """Of `folder` and its parents, removes at the end those that were not there before and hold
    nothing."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        yield
    finally:
        for path in made:
            with suppress(OSError):  # not made, or not empty
                path.rmdir()


def _acquire(scratch: Path, output: Path) -> int:
    started = time.monotonic()
    told = False
    while True:
        try:
            scratch.mkdir(parents=True, exist_ok=True)
            lock = os.open(scratch / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
        except FileNotFoundError:  # the last owner has just removed the folder
            continue
        except OSError as error:
            raise DataError(f"{output}: cannot be written: {error}") from None
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not told and time.monotonic() - started > PATIENCE_SECONDS:
                    print(f"waiting: another process prepares {output}", file=sys.stderr)
                    told = True
                time.sleep(0.05)
        if _still_there(scratch / "lock", lock):
            return lock
        os.close(lock)


def _still_there(path: Path, lock: int) -> bool:
    """Whether `path` is the file that was locked, and not a successor of a removed one."""
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    ours = os.fstat(lock)
    return (there.st_ino, there.st_dev) == (ours.st_ino, ours.st_dev)


def publish(finished: Path, output: Path, scratch: Path) -> None:
    """Flush `finished` to disk, rename it to `output`, and remove the scratch folder."""
    for path in [*finished.iterdir(), finished]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    os.rename(finished, output)
    shutil.rmtree(scratch)


def require_free(output: Path) -> None:
    """Raise DataError unless `output` is absent or an empty folder."""
    if output.is_dir() and not any(output.iterdir()):
        return
    if output.exists():
        raise DataError(f"{output}: exists and is not a prepared folder; choose another output")


def sha256_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
