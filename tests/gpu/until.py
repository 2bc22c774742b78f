"""Runs pytest for some seconds, then interrupts it, so that it says what it has found by then.

python tests/gpu/until.py SECONDS [--share=I/N] [ARGUMENT...]

A test that hangs where an interrupt does not reach, as in a call of the driver, is ended a little
later, with where it hung; so that this loses nothing, failures are named at once. Memory of the
device that a test leaves behind is given back, since other processes test on it.

With a share, only the tests of every Nth mixer, from the Ith on: no mixer is in two shares, so that
no two processes compile its kernels.
"""

from __future__ import annotations

import faulthandler
import gc
import os
import signal
import sys
from typing import TextIO

import pytest

GRACE = 8
"""Seconds that an interrupted pytest may take to say what it has found."""


class Share:
    """Keeps a part of the tests that have a parameter `case`."""

    def __init__(self, part: int, parts: int) -> None:
        self.part, self.parts = part, parts

    def pytest_collection_modifyitems(self, items: list[pytest.Function]) -> None:
        """Leaves the order as it is."""
        mixers = list(dict.fromkeys(_mixer(item) for item in items))
        kept = mixers[self.part - 1 :: self.parts]
        items[:] = [item for item in items if _mixer(item) in kept]


class Found:
    """Names in `out` what fails or is skipped, and leaves nothing of a test on the device."""

    def __init__(self, out: TextIO) -> None:
        self.out = out

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """With the end of the error."""
        if report.failed:
            print(f"\nFAILED {report.nodeid}:\n{report.longreprtext[-500:]}", file=self.out)
        if report.skipped and isinstance(report.longrepr, tuple):
            print(f"\nSKIPPED {report.nodeid}: {report.longrepr[2]}", file=self.out)

    def pytest_runtest_logfinish(self) -> None:
        """The last error's frames hold tensors, and torch keeps what was freed for itself."""
        for name in ("last_value", "last_traceback", "last_exc"):
            vars(sys).pop(name, None)
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_initialized():
            gc.collect()
            torch.cuda.empty_cache()


def _mixer(item: pytest.Function) -> str:
    return item.callspec.params["case"].mixer


if __name__ == "__main__":
    seconds, *arguments = sys.argv[1:]
    out = os.fdopen(os.dup(2), "w", buffering=1)  # pytest takes 2 for itself
    plugins: list[object] = [Found(out)]
    if arguments and arguments[0].startswith("--share="):
        part, parts = arguments.pop(0).removeprefix("--share=").split("/")
        plugins.append(Share(int(part), int(parts)))
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.alarm(int(seconds))
    faulthandler.dump_traceback_later(int(seconds) + GRACE, exit=True, file=out)
    arguments[:0] = ["-p", "no:faulthandler"]  # it would take this back at the first failure
    sys.exit(pytest.main(arguments, plugins))
