"""A process of its own for measurements: what breaks the device, dies or hangs there costs no more
than itself."""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch


class Failure(Exception):
    """A task that gave no result; the message says why."""

    def __init__(self, message: str, kind: str = "", *, fatal: bool = False) -> None:
        super().__init__(message)
        self.memory = kind == "memory"
        """It ran out of the device's memory."""
        self.absent = kind == "absent"
        """A package is not installed."""
        self.fatal = fatal
        """The process did not survive it."""


class Worker:
    """Runs functions in another process, one after another; a process that is lost is replaced."""

    def __init__(self) -> None:
        self._process: Any = None
        self._pipe: Any = None

    def ask(self, seconds: float, function: Callable[..., Any], *arguments: Any) -> Any:
        """What `function(*arguments)` returns there (all must be picklable). The first time, and
        after a loss, a process is started: some seconds, of those given.

        Raises:
            Failure: it raised, took longer than `seconds`, or the process died.
        """
        if self._process is None:
            context = multiprocessing.get_context("spawn")
            self._pipe, theirs = context.Pipe()
            self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
            self._process.start()
            theirs.close()
        self._pipe.send((function, arguments))
        try:
            if not self._pipe.poll(seconds):
                self.close()
                raise Failure(f"took longer than {seconds:.0f} s", fatal=True)
            result, message, kind, broken = self._pipe.recv()
        except (EOFError, ConnectionError):
            self._process.join()
            code = self._process.exitcode
            self.close()
            raise Failure(f"the process died with exit code {code}", fatal=True) from None
        if broken:
            self.close()
        if message is not None:
            raise Failure(message, kind, fatal=broken)
        return result

    def close(self) -> None:
        """Ends the process, whatever it is doing."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._pipe.close()
        self._process = self._pipe = None


def _serve(pipe: Connection) -> None:
    """Answers until the other end is gone: a result, or an error, its kind and whether the device
    is broken."""
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            return
        try:
            answer = function(*arguments), None, "", False
        except Exception as error:  # a case may raise anything, and the others are to follow
            traceback.clear_frames(error.__traceback__)  # they hold tensors
            answer = None, *failure(error), _broken()
        pipe.send(answer)


def failure(error: Exception) -> tuple[str, str]:
    """Message and kind of a `Failure` for an error: the first line of what it says, the last where
    there are more (a compiler's reason comes after the code), and where it was raised."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    said = lines[0][:200] if len(lines) == 1 else f"{lines[0][:100]} ... {lines[-1][:200]}"
    message = f"{type(error).__name__}: {said}"
    if places := traceback.extract_tb(error.__traceback__):
        message += f" ({Path(places[-1].filename).name}:{places[-1].lineno})"
    if isinstance(error, torch.OutOfMemoryError):
        return message, "memory"
    return message, "absent" if isinstance(error, ImportError) else ""


def _broken() -> bool:
    """Whether an error has left the device unusable for this process, as a bad address does."""
    if not (torch.cuda.is_available() and torch.cuda.is_initialized()):
        return False
    try:
        torch.cuda.empty_cache()
        torch.cuda.synchronize()
        return torch.ones(1, device="cuda").item() != 1
    except RuntimeError:
        return True
