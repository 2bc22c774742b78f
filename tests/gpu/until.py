"""Runs pytest for some seconds, then interrupts it, so that it says what it has found by then.

python tests/gpu/until.py SECONDS [--share=I/N] [ARGUMENT...]

With a share, only the tests of every Nth mixer, from the Ith on: no mixer is in two shares, so that
no two processes compile its kernels.
"""

from __future__ import annotations

import signal
import sys

import pytest


class Share:
    """Keeps a part of the tests that have a parameter `case`."""

    def __init__(self, part: int, parts: int) -> None:
        self.part, self.parts = part, parts

    def pytest_collection_modifyitems(self, items: list[pytest.Function]) -> None:
        """Leaves the order as it is."""
        mixers = list(dict.fromkeys(_mixer(item) for item in items))
        kept = mixers[self.part - 1 :: self.parts]
        items[:] = [item for item in items if _mixer(item) in kept]


def _mixer(item: pytest.Function) -> str:
    return item.callspec.params["case"].mixer


if __name__ == "__main__":
    seconds, *arguments = sys.argv[1:]
    plugins = []
    if arguments and arguments[0].startswith("--share="):
        part, parts = arguments.pop(0).removeprefix("--share=").split("/")
        plugins.append(Share(int(part), int(parts)))
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.alarm(int(seconds))
    sys.exit(pytest.main(arguments, plugins))
