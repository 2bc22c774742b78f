"""Saving, keeping and loading checkpoints in one process."""

from __future__ import annotations

import json
import logging
import os
import resource
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from rondo.parallel.checkpoint import (
    Checkpointer,
    CheckpointError,
    model_tensors,
    optimizer_tensors,
    state_digest,
)
from rondo.tests.distributed.checkpoint_cases import Run, change

Tensors = dict[str, dict[str, Tensor]]


def odd_tensors() -> Tensors:
    """Scalars, empty tensors, strides and types that a writer may stumble over."""
    return {
        "model": {
            "scalar": torch.tensor(3.0),
            "transposed": torch.arange(12.0).view(3, 4).T,
            "every_other": torch.arange(10)[::2],
            "expanded": torch.tensor([1.0]).expand(5),
            "empty": torch.empty(0, 4),
            "half": torch.tensor([1.5, -0.0, float("nan")], dtype=torch.bfloat16),
            "mask": torch.tensor([True, False]),
        },
        "optimizer": {"scalar.step": torch.tensor(41.0), "big": torch.full((1000,), 2.0)},
    }


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("asynchronous", [False, True])
def test_what_is_loaded_is_what_was_saved(tmp_path: Path, asynchronous: bool) -> None:
    tensors = odd_tensors()
    digest = state_digest(tensors)
    state = {"step": 7, "loss": 0.1 + 0.2, "tiny": 5e-324, "nested": {"rng": [2**63, -1]}}
    checkpointer = Checkpointer(tmp_path / "new" / "folder", keep=0, asynchronous=asynchronous)
    assert checkpointer.newest() is None
    checkpointer.save(7, tensors, state, {"model/config.json": "{}", "tokens.bin": b"\x00\xff"})
    checkpointer.wait()
    path = checkpointer.newest()
    assert path == tmp_path / "new" / "folder" / "step-000000007"
    assert (path / "tokens.bin").read_bytes() == b"\x00\xff"
    assert json.loads((path / "state.json").read_text()) == state
    tensors["model"]["expanded"] = torch.zeros(5)
    change(tensors)
    assert checkpointer.load(path, tensors) == state
    assert state_digest(tensors) == digest
    checkpointer.close()


def test_background_saves_do_not_see_later_values(tmp_path: Path) -> None:
    weight = torch.zeros(1 << 20)
    checkpointer = Checkpointer(tmp_path, keep=0)
    for step in range(1, 5):
        weight.fill_(step)
        checkpointer.save(step, {"model": {"weight": weight}}, {})
        weight.fill_(-1)
    checkpointer.wait()
    for step in range(1, 5):
        checkpointer.load(tmp_path / f"step-{step:09d}", {"model": {"weight": weight}})
        assert weight.unique().tolist() == [step]
    checkpointer.close()


def test_training_goes_on_as_if_never_interrupted(tmp_path: Path) -> None:
    straight = Run(seed=0, steps=5)
    half, other = Run(seed=0, steps=2), Run(seed=1, steps=1)
    checkpointer = Checkpointer(tmp_path, keep=1)
    checkpointer.save(2, half.tensors, {})
    checkpointer.load(tmp_path / "step-000000002", other.tensors)
    other.train(3)
    assert state_digest(other.tensors) == state_digest(straight.tensors)
    assert state_digest(half.tensors) != state_digest(straight.tensors)
    checkpointer.close()


def test_missing_optimizer_state_is_made_without_a_step() -> None:
    run = Run(seed=0)
    run.model.up.weight.grad = torch.ones(9, 6)
    before = state_digest({"model": model_tensors([run.model])})
    tensors = optimizer_tensors([run.model], run.optimizers)
    assert sorted(name for name in tensors if name.startswith(("up", "gain"))) == [
        "gain.exp_avg",
        "gain.exp_avg_sq",
        "gain.step",
        "up.bias.exp_avg",
        "up.bias.exp_avg_sq",
        "up.bias.step",
        "up.weight.momentum_buffer",
    ]
    assert all(not tensor.any() for tensor in tensors.values())
    assert state_digest({"model": model_tensors([run.model])}) == before
    assert run.model.up.weight.grad.eq(1).all()
    assert run.model.gain.grad is None
    stranger = torch.optim.AdamW([nn.Parameter(torch.zeros(2))])
    with pytest.raises(CheckpointError, match=r"shape \(2,\) that is not the model's"):
        optimizer_tensors([run.model], [stranger])


def test_tied_and_wrapped_modules_keep_one_plain_name() -> None:
    compiled = nn.Module()
    compiled._orig_mod = nn.Linear(3, 3)  # what torch.compile makes of a module
    model = nn.Sequential(nn.Embedding(4, 3), compiled, nn.Linear(3, 4))
    model[2].weight = model[0].weight
    assert list(model_tensors([model])) == ["0.weight", "1.weight", "1.bias", "2.bias"]


@pytest.mark.parametrize("keep", [0, 1, 2])
def test_the_newest_stay(tmp_path: Path, keep: int) -> None:
    checkpointer = Checkpointer(tmp_path, keep=keep)
    for step in (3, 20, 100, 1000):
        checkpointer.save(step, {"model": {"w": torch.ones(2)}}, {})
    checkpointer.close()
    every = ["step-000000003", "step-000000020", "step-000000100", "step-000001000"]
    assert names(tmp_path) == every[-keep if keep else 0 :]


def test_newest_goes_by_step_not_by_time(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path, keep=0)
    for step in (2, 1_234_567_890, 11):
        checkpointer.save(step, {"model": {"w": torch.ones(2)}}, {})
    checkpointer.wait()
    for age, path in enumerate(sorted(tmp_path.iterdir())):
        os.utime(path, (10_000 - age, 10_000 - age))
    for other in ("step-latest", "step-12", "notes", "step-0000000020.bak"):
        (tmp_path / other).mkdir()
    assert checkpointer.newest() == tmp_path / "step-1234567890"
    checkpointer.close()


def test_a_step_can_be_saved_again(tmp_path: Path) -> None:
    weight = torch.zeros(3)
    checkpointer = Checkpointer(tmp_path, keep=1)
    for value in (1, 2):
        checkpointer.save(5, {"model": {"w": weight.fill_(value)}}, {"value": value})
        checkpointer.wait()
    assert checkpointer.load(tmp_path / "step-000000005", {"model": {"w": weight}}) == {"value": 2}
    assert names(tmp_path) == ["step-000000005"]
    checkpointer.close()


def test_leftovers_of_dead_processes_are_cleared_away(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path, keep=0)
    for step in (1, 2):
        checkpointer.save(step, {"model": {"w": torch.ones(2)}}, {})
    checkpointer.close()
    (tmp_path / "step-000000002").rename(tmp_path / ".step-000000002.old")  # killed in between
    shutil.copytree(tmp_path / "step-000000001", tmp_path / ".step-000000001.old")
    shutil.copytree(tmp_path / "step-000000001", tmp_path / ".step-000000003.partial")
    shutil.copytree(tmp_path / "step-000000001", tmp_path / ".step-000000004.removed")
    (tmp_path / ".notes").mkdir()
    checkpointer = Checkpointer(tmp_path, keep=0)
    assert names(tmp_path) == [".notes", "step-000000001", "step-000000002"]
    assert checkpointer.newest() == tmp_path / "step-000000002"
    checkpointer.close()


@contextmanager
def disk_of(size: int) -> Iterator[None]:
    """No file can grow beyond `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_full_disk_is_reported_and_harms_nothing(tmp_path: Path, asynchronous: bool) -> None:
    tensors = {"model": {"w": torch.ones(1 << 20)}}
    checkpointer = Checkpointer(tmp_path, keep=1, asynchronous=asynchronous)
    checkpointer.save(1, tensors, {})
    checkpointer.wait()
    with (
        disk_of(1 << 18),
        pytest.raises(CheckpointError, match=r"step-000000002: .*File too large"),
    ):
        checkpointer.save(2, tensors, {})
        checkpointer.wait()
    assert not checkpointer.failed
    assert names(tmp_path) == ["step-000000001"]
    assert checkpointer.newest() == tmp_path / "step-000000001"
    checkpointer.save(3, tensors, {})
    checkpointer.close()
    assert names(tmp_path) == ["step-000000003"]


def test_a_failed_background_save_is_heard_of_at_the_next(tmp_path: Path) -> None:
    tensors = {"model": {"w": torch.ones(1 << 20)}}
    checkpointer = Checkpointer(tmp_path, keep=1)
    with disk_of(1 << 18):
        checkpointer.save(2, tensors, {})
        with pytest.raises(CheckpointError, match="File too large"):
            checkpointer.save(3, tensors, {})
        checkpointer.save(4, tensors, {})
        while not checkpointer.failed:
            time.sleep(0.001)
        with pytest.raises(CheckpointError, match="step-000000004"):
            checkpointer.check()
    checkpointer.check()
    checkpointer.close()
    assert names(tmp_path) == []


def test_bad_arguments_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file: FileExistsError"):
        Checkpointer(tmp_path / "file", keep=0)
    with pytest.raises(CheckpointError, match="keep must be at least 0, got -1"):
        Checkpointer(tmp_path, keep=-1)
    checkpointer = Checkpointer(tmp_path / "ok", keep=0)
    for name in ("../evil", "/evil", "manifest.json", "a\nb", ".hidden", "a//b"):
        with pytest.raises(CheckpointError, match="cannot be a file of a checkpoint"):
            checkpointer.save(1, {}, {}, {name: ""})
    assert names(tmp_path / "ok") == []


def test_damage_is_warned_of_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpointer = Checkpointer(tmp_path, keep=0)
    for step in (1, 2):
        checkpointer.save(step, {"model": {"w": torch.ones(2)}}, {})
    checkpointer.wait()
    file = tmp_path / "step-000000002" / "model" / "shard-00001.safetensors"
    size = file.stat().st_size
    os.truncate(file, size - 1)
    with caplog.at_level(logging.WARNING, logger="rondo"):
        for _ in range(2):
            assert checkpointer.newest() == tmp_path / "step-000000001"
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert warnings == [
        f"damaged checkpoint {tmp_path}/step-000000002 is passed over: "
        f"model/shard-00001.safetensors has {size - 1} bytes, expected {size}"
    ]
    checkpointer.close()
