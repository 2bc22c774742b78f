"""Every Triton kernel compiles for three families of chips and fits them; no GPU is needed."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from typing import Any

import pytest

pytest.importorskip("triton")

from rondo.kernels.triton_configs import CONFIGS

pytestmark = pytest.mark.slow
SPILLED = {("delta_rule_pairs", "sm90"): 256}
"""Bytes of a thread that need not fit into registers, of other kernels 32: with a decay a head that
is the price of two warps, most of it paid once a program, a few numbers once a tile of values."""
FEW = 32
"""Bytes of a thread that may lie in memory: a few registers that a version of the assembler puts
aside, however many are left, cost less than the smaller tile that would keep them."""


def compiled() -> list[dict[str, Any]]:
    """What each kernel uses of each chip. In a process of its own: here kernels are numpy."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "rondo.kernels.triton_ahead"]
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_kernel_fits_every_chip() -> None:
    """One test: several may be run by several processes, and each would compile for minutes."""
    used = compiled()
    assert {row["family"] for row in used} == {"sm80", "sm90", "gfx942"}
    assert [row for row in used if row["shared"] > row["limit"]] == []
    assert [r for r in used if r["spilled"] > SPILLED.get((r["kernel"], r["family"]), FEW)] == []
    assert [r for r in used if not 0 < r["registers"] <= r["most"]] == []
    recurrences = [r for r in used if r["kernel"].startswith(("delta_rule", "linear_attention"))]
    assert [r for r in recurrences if r.get("wgmma")] == []
    check_all_configurations(used)


def check_all_configurations(used: list[dict[str, Any]]) -> None:
    """Those that are measured only are there as well, and once as they stand, not cut to smaller
    heads."""
    found = {(row["kernel"], *row["config"].items()) for row in used}
    for name, rows in CONFIGS.items():
        for config in itertools.chain.from_iterable(rows.values()):
            assert (name, *config.items()) in found
