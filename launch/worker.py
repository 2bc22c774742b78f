"""One rank under `rondo launch local` or torchrun: `python -m rondo.launch.worker MODULE WORDS...`.

Runs a module as `python -m MODULE WORDS...` would, with three things added: its output goes to a
log of its own; it dies with its launcher, whose lock on the run folder does not hold from then on;
and torchrun, which would end all ranks because one stopped after a checkpoint, is told that it
succeeded, while a file has the exit code.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import runpy
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rondo.launch.supervise import STOPPED

_PR_SET_PDEATHSIG = 1


def main(argv: Sequence[str]) -> int:
    """The command; see the module."""
    parser = argparse.ArgumentParser(prog="python -m rondo.launch.worker", description=__doc__)
    parser.add_argument("--logs", type=Path, help="folder of a log for each rank")
    parser.add_argument("--codes", type=Path, help="folder for process numbers and exit codes")
    parser.add_argument("module", help="what to run")
    parser.add_argument("words", nargs=argparse.REMAINDER, help="its arguments")
    options = parser.parse_args(argv)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    rank = os.environ.get("RANK", "0")
    with _log(options.logs, int(rank)):
        if options.codes is None:
            return _run(options.module, options.words)
        put(options.codes / f"{rank}.pid", os.getpid())
        code = _run(options.module, options.words)
        put(options.codes / f"{rank}.code", code)
    return 0 if code == STOPPED else code


def put(path: Path, number: int) -> None:
    """Writes a number to a file that is whole or not there: torchrun kills ranks at any time."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(str(number))
    part.replace(path)


def _run(module: str, words: list[str]) -> int:
    sys.argv = [module, *words]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except Exception:
        traceback.print_exc()
        return 1
    return 0


@contextmanager
def _log(folder: Path | None, rank: int) -> Iterator[None]:
    """Sends what this process prints to its log; what rank 0 prints is shown as well."""
    if folder is None:
        yield
        return
    path, tee = folder / f"rank-{rank:03d}.log", None
    if rank == 0:
        tee = subprocess.Popen(["tee", "-a", str(path)], stdin=subprocess.PIPE)
        assert tee.stdin is not None, "a pipe was asked for"
        target = tee.stdin.fileno()
    else:
        target = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    before = os.dup(1), os.dup(2)
    _redirect(target, target)
    try:
        yield
    finally:
        _redirect(*before)
        if tee is not None:
            tee.communicate()  # the last lines are in the file when this rank has ended


def _redirect(out: int, err: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(out, 1)
    os.dup2(err, 2)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
