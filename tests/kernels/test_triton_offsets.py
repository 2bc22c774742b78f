"""No Triton kernel counts offsets in fewer bits than a large call needs; no GPU is needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

pytest.importorskip("triton")

from rondo.kernels.triton_configs import CONFIGS


@pytest.fixture(scope="module")
def lines() -> list[dict[str, Any]]:
    """In a process of its own: here kernels are numpy."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, "-m", "rondo.tests.kernels.triton_offsets"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_nothing_overflows_32_bits(lines: list[dict[str, Any]]) -> None:
    kernels = [line for line in lines if "kernel" in line]
    assert {line["kernel"] for line in kernels} == set(CONFIGS)
    assert [line for line in kernels if line["found"]] == []
    forms = {line["kernel"] for line in kernels if line["forms"]}
    assert forms >= {"linear_attention_walk", "linear_attention_mix", "delta_rule_walk"}


def test_a_new_batch_or_length_compiles_nothing(lines: list[dict[str, Any]]) -> None:
    assert [line for line in lines if line.get("specialised")] == []


def test_what_would_overflow_is_found(lines: list[dict[str, Any]]) -> None:
    found = {line["control"]: line["found"] for line in lines if "control" in line}
    assert found.pop("wide") == []
    assert len(found) == 5 and all(found.values())
