"""`rondo stop`: end a run after a checkpoint, wherever it runs."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Sequence

from rondo.errors import UserError
from rondo.launch import slurm
from rondo.launch.folder import RunFolder, find_run
from rondo.launch.lock import describe, is_alive, read_owner
from rondo.launch.options import parse_folder

_ABOUT = (
    "Ends a run after a checkpoint, and its jobs that wait in SLURM's queue. "
    "`rondo launch` makes it go on."
)


def stop(folder: RunFolder) -> list[str]:
    """Asks whatever runs or waits for a run to end; returns what it did, in words.

    Raises UserError where nothing runs, or it runs where this machine cannot reach it.
    """
    lock, queue = folder.launch / "lock", slurm.queue()
    owner = read_owner(lock)
    alive = owner is not None and is_alive(owner, lock)
    waiting = [job for job in folder.jobs() if queue.get(job) == "PENDING"]
    if not alive and not waiting:
        raise UserError(f"{folder.path}: no launcher runs it and no job waits for it")
    folder.stop_file.touch()  # before the signal: what ends now is not to be started again
    done = []
    if waiting:
        slurm.call("scancel", *waiting)
        done.append(f"cancelled job {', '.join(waiting)}")
    if alive and owner is not None:
        if owner["job"]:
            slurm.call("scancel", "--batch", "--signal=USR1", owner["job"])
        elif owner["host"] == socket.gethostname():
            os.kill(owner["pid"], signal.SIGTERM)
        else:
            raise UserError(f"{describe(owner)} runs it; type this there")
        done.append(f"asked {describe(owner)} to stop after a checkpoint")
    return done


def main(words: Sequence[str]) -> int:
    """Runs `rondo stop RUN`."""
    try:
        help_text = "run folder, or the name of one under runs/"
        word = parse_folder(words, "stop", _ABOUT, help_text)
    except SystemExit:  # after --help
        return 0
    for line in stop(find_run(word)):
        print(line)
    return 0
