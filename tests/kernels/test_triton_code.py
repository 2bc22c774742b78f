"""What the intermediate code of every Triton kernel says of large calls and of transposed products;
no GPU is needed."""

from __future__ import annotations

import importlib
import inspect
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import pytest

pytest.importorskip("triton")

from rondo.kernels import backend
from rondo.kernels.triton_configs import CONFIGS
from rondo.tests.kernels.operator_calls import CALLS

Lines = list[dict[str, Any]]


@pytest.fixture(scope="module")
def lines() -> Lines:
    """In a process of its own: here kernels are numpy."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, "-m", "rondo.tests.kernels.triton_code"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def of_kernels(lines: Lines, what: str) -> Lines:
    """Where it is found in a kernel of the package."""
    return [line for line in lines if "kernel" in line and line[what]]


def of_controls(lines: Lines, what: str) -> set[str]:
    """The kernels made for a test in which it is found."""
    return {line["control"] for line in lines if "control" in line and line[what]}


def test_every_kernel_is_read(lines: Lines) -> None:
    assert {line["kernel"] for line in lines if "kernel" in line} == set(CONFIGS)
    others = {line["kernel"] for line in of_kernels(lines, "other")}
    assert others >= {"linear_attention_walk", "linear_attention_mix", "delta_rule_walk"}


def test_nothing_overflows_32_bits(lines: Lines) -> None:
    assert of_kernels(lines, "overflows") == []


def test_a_new_batch_or_length_compiles_nothing(lines: Lines) -> None:
    assert of_kernels(lines, "specialised") == []


def test_what_would_overflow_is_found(lines: Lines) -> None:
    wrong = {f"narrow_{name}" for name in ("program", "stride", "index", "loop", "cut")}
    assert of_controls(lines, "overflows") == wrong


def test_no_sum_of_products_is_transposed_for_another(lines: Lines) -> None:
    """Triton 3.4.0 to 3.7.0 get this wrong on Hopper (flash-linear-attention issue 640)."""
    assert of_kernels(lines, "transposed_sums") == []


def test_transposed_sums_are_found(lines: Lines) -> None:
    ways = ("renamed", "by_helpers", "by_permute", "round_later", "while")
    assert of_controls(lines, "transposed_sums") == {f"turned_{way}" for way in ways}
    assert "straight" in of_controls(lines, "transposed")


def taking_backend(package: str) -> list[Callable[..., Any]]:
    """The functions of a package that choose their kernels."""
    found = [f for f in vars(importlib.import_module(package)).values() if inspect.isfunction(f)]
    here = [f for f in found if f.__module__ == package and not f.__name__.startswith("_")]
    return [f for f in here if "backend" in inspect.signature(f).parameters]


def test_what_transposes_operands_is_chosen_with_the_doubt(
    lines: Lines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By `choose_recurrence`: that a sum is not transposed is our reading of a bug that nobody has
    seen gone from these kernels."""

    class Chosen(Exception):
        pass

    def say(operator: str, name: str, device: str, reason: str, warn: bool = False) -> NoReturn:
        raise Chosen(reason if warn else "without a doubt")

    monkeypatch.setattr(backend, "triton_doubt", lambda device: "it is Tuesday")
    monkeypatch.setattr(backend, "log_once", say)
    packages = {line["module"].rpartition(".")[0] for line in of_kernels(lines, "transposed")}
    functions = [taking_backend(package) for package in packages]
    assert [] not in functions, packages
    reasons = {}
    for function in itertools.chain(*functions):
        with pytest.raises(Chosen) as chosen:
            function(*CALLS[function.__name__.removesuffix("_stretch")], backend="triton")
        reasons[function.__name__] = str(chosen.value)
    assert {"gated_delta_rule_stretch", "gated_linear_attention_summary"} < {*reasons}
    assert {*reasons.values()} == {"asked for, although it is Tuesday"}, reasons
