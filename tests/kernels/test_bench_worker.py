"""The process that the benchmarks measure in: what it returns, and what it survives."""

from __future__ import annotations

import importlib
import math
import os
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from rondo.kernels.bench import worker as module
from rondo.kernels.bench.worker import Failure, Worker


@pytest.mark.slow
def test_it_answers_and_outlives_what_breaks_it() -> None:
    worker = Worker()
    try:
        assert worker.ask(60.0, math.sqrt, 4.0) == 2.0
        first = worker.ask(5.0, os.getpid)
        assert first != os.getpid()
        with pytest.raises(Failure, match="ValueError: invalid literal") as found:
            worker.ask(5.0, int, "x")
        assert not (found.value.memory or found.value.absent or found.value.fatal)
        with pytest.raises(Failure, match="No module named 'not_there'") as found:
            worker.ask(5.0, importlib.import_module, "not_there")
        assert found.value.absent
        assert worker.ask(5.0, os.getpid) == first
        with pytest.raises(Failure, match="took longer than 1 s") as found:
            worker.ask(1.0, time.sleep, 60.0)
        assert found.value.fatal
        with pytest.raises(Failure, match="the process died with exit code 3") as found:
            worker.ask(60.0, os._exit, 3)
        assert found.value.fatal
    finally:
        worker.close()


def test_out_of_memory_is_told_from_other_errors() -> None:
    assert module.failure(torch.OutOfMemoryError("3 GiB")) == ("OutOfMemoryError: 3 GiB", "memory")
    assert module.failure(RuntimeError("one")) == ("RuntimeError: one", "")


class Pipe:
    """Asks once, then is gone."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.asked = [(function, ())]
        self.answers: list[Any] = []

    def recv(self) -> Any:
        if not self.asked:
            raise EOFError
        return self.asked.pop()

    def send(self, answer: Any) -> None:
        self.answers.append(answer)


def refuse() -> None:
    raise SyntaxError("at 3:4:\n    x = dot(a, b)\n\nshapes differ\n")


def interrupt() -> None:
    raise KeyboardInterrupt


@pytest.mark.quick
def test_a_case_that_raises_is_answered_and_an_interrupt_is_not() -> None:
    pipe = Pipe(refuse)
    module._serve(pipe)
    [(result, message, kind, broken)] = pipe.answers
    line = refuse.__code__.co_firstlineno + 1
    assert message == f"SyntaxError: at 3:4: ... shapes differ (test_bench_worker.py:{line})"
    assert (result, kind, broken) == (None, "", False)
    pipe = Pipe(interrupt)
    with pytest.raises(KeyboardInterrupt):
        module._serve(pipe)
    assert pipe.answers == []


@pytest.mark.parametrize(("fails", "broken"), [(True, True), (False, False)])
def test_a_device_that_an_error_has_broken_is_noticed(
    fails: bool, broken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def synchronize() -> None:
        if fails:
            raise RuntimeError("an illegal memory access was encountered")

    ones = torch.ones
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(torch, "ones", lambda size, device: ones(size))
    assert module._broken() == broken
