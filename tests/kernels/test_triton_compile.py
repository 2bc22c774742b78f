"""Every Triton kernel compiles for three families of chips and fits them; no GPU is needed."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("triton")

from rondo.kernels.triton_configs import CONFIGS

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def used() -> Iterator[list[dict[str, Any]]]:
    """What each kernel uses of each chip. In a process of its own: here kernels are numpy."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "rondo.kernels.triton_ahead"]
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    yield [json.loads(line) for line in done.stdout.splitlines()]


def test_fits_shared_memory(used: list[dict[str, Any]]) -> None:
    assert {row["family"] for row in used} == {"sm80", "sm90", "gfx942"}
    assert [row for row in used if row["shared"] > row["limit"]] == []


def test_needs_no_more_registers_than_there_are(used: list[dict[str, Any]]) -> None:
    over = [row for row in used if row["spilled"] or not 0 < row["registers"] <= row["most"]]
    assert over == []


def test_every_configuration_is_compiled(used: list[dict[str, Any]]) -> None:
    """Those that are measured only as well, and once as they stand, not cut to smaller heads."""
    compiled = {(row["kernel"], *row["config"].items()) for row in used}
    for name, rows in CONFIGS.items():
        for config in itertools.chain.from_iterable(rows.values()):
            assert (name, *config.items()) in compiled
