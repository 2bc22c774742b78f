"""The training benchmark of presets: its figures on a small model, and no GPU no run."""

from __future__ import annotations

import argparse
import json
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from rondo.errors import UserError
from rondo.kernels.bench.worker import Failure
from rondo.models import Decoder, ModelConfig
from rondo.pretrain import bench_presets
from rondo.pretrain.bench_presets import bench, fitting, measure

CPU = torch.device("cpu")
CONFIG = ModelConfig(vocab_size=32, dim=16, num_layers=1, pattern=["gated_deltanet"])


def test_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_presets, "peak_flops", lambda device, dtype: 1e9)
    figures = measure(CONFIG, 2, 24, CPU, rounds=2, compiled=False)
    assert (figures["batch"], figures["length"]) == (2, 24)
    assert figures["parameters"] > 32 * 16
    assert 0 < figures["mfu"] < figures["tokens_per_second"]


def test_halves_the_batch_until_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []

    def measure(config: ModelConfig, batch: int, *others: object) -> dict[str, int]:
        tried.append(batch)
        if batch > 2:
            raise torch.OutOfMemoryError
        return {"batch": batch}

    monkeypatch.setattr(bench_presets, "measure", measure)
    assert fitting(CONFIG, 8, 24, CPU, 1, False) == {"batch": 2}
    assert tried == [8, 4, 2]
    monkeypatch.setattr(bench_presets, "measure", lambda *a: measure(CONFIG, 9))
    with pytest.raises(UserError, match="24 tokens do not fit; take a smaller --length"):
        fitting(CONFIG, 2, 24, CPU, 1, False)


def test_figures_of_a_mixture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what a step takes part in: experts that a token does not go to are not counted."""
    monkeypatch.setattr(bench_presets, "peak_flops", lambda device, dtype: 1e9)
    figures = []
    for experts in (4, 8):
        ffn = {"num_experts": experts, "top_k": 2, "expert_dim": 16, "router": "rmoe"}
        config = ModelConfig(
            vocab_size=32, dim=16, num_layers=2, pattern=["attention+moe"], ffns={"moe": ffn},
            mixers={"attention": {"num_heads": 2}},
        )  # fmt: skip
        row = measure(config, 2, 24, CPU, rounds=1, compiled=False)
        figures.append(row["mfu"] / row["tokens_per_second"])
        assert row["mfu"] > 0
    assert figures[1] == pytest.approx(figures[0], rel=0.05)  # the router alone grows


def test_the_default_presets_are_there() -> None:
    for name in bench_presets.PRESETS:
        assert bench_presets.from_preset(name).vocab_size > 0


class Fails:
    """A worker that has no memory for one preset, and cannot compile another. By its clock a
    measurement takes 10 seconds, a compiled one 70, or what it is given where that is less."""

    def __init__(self) -> None:
        self.asked: list[tuple[str | None, bool]] = []
        self.now = 0.0

    def ask(self, seconds: float, function: Any, config: ModelConfig, *options: Any) -> Any:
        assert seconds > 0 and function is fitting
        pickle.dumps((function, config, *options))
        batch, compiled = options[0], options[-1]
        self.asked.append((config.preset, compiled))
        taken = 70.0 if compiled else 10.0
        self.now += min(seconds, taken)
        if seconds < taken:
            raise Failure("took longer than it may", fatal=True)
        if config.preset == "gated-deltanet-1.3b":
            raise Failure("UserError: sequences of 8 tokens do not fit")
        if config.preset == "rmoe-0.9b" and compiled:
            raise Failure("BackendCompilerFailed: no | compiler")
        assert batch == (2 if compiled else 4)
        speed = 9.0 + compiled
        return {"batch": 2, "length": 8, "tokens_per_second": speed, "mfu": 0.5, "peak_memory": 1}

    def close(self) -> None:
        """Nothing is held."""


NAMES = ["gated-deltanet-1.3b", "gated-deltanet-340m", "rmoe-0.9b"]


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Fails:
    """Measures on a chip that there is not."""
    worker = Fails()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some Chip 9")
    monkeypatch.setattr(bench_presets, "Worker", lambda: worker)
    return worker


def options(out: Path, seconds: float = math.inf) -> argparse.Namespace:
    return argparse.Namespace(
        presets=NAMES, seconds=seconds, eager=False, batch=4, length=8, rounds=1, out=out
    )


def written(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "presets-some-chip-9.json").read_text())["rows"]


def test_one_failure_leaves_the_others(
    worker: Fails, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench(options(tmp_path), lambda: worker.now) == 1
    assert worker.asked == [(name, compiled) for compiled in (False, True) for name in NAMES]
    failed, fast, eager = written(tmp_path)
    assert failed["errors"] == [
        "eager: UserError: sequences of 8 tokens do not fit",
        "compiled: UserError: sequences of 8 tokens do not fit",
    ]
    assert fast["modes"] == {"eager": 9.0, "compiled": 10.0} and fast["tokens_per_second"] == 10.0
    assert eager["mfu"] == 0.5
    table = (tmp_path / "presets-some-chip-9.md").read_text()
    assert table.startswith("Some Chip 9, torch ") and table.count("\n| ") == 5
    for text in (table, capsys.readouterr().out):
        assert "| gated-deltanet-340m | 2 x 8 | 10 (eager 9; compiled 10) | 50.0% |" in text
        assert "| 9 (eager 9; compiled: BackendCompilerFailed: no / compiler) | 50.0% |" in text
        assert "| gated-deltanet-1.3b | failed: eager: UserError: sequences" in text


def test_compiling_one_costs_no_other_its_figure(worker: Fails, tmp_path: Path) -> None:
    given = options(tmp_path, seconds=90.0)
    given.presets = NAMES[1:]
    assert bench(given, lambda: worker.now) == 0
    first, second = written(tmp_path)
    assert first["modes"] == {"eager": 9.0, "compiled": 10.0}
    assert second["modes"] == {"eager": 9.0}
    assert second["errors"] == ["compiled: the time was up"]


def test_a_preset_without_a_figure_is_an_error(worker: Fails, tmp_path: Path) -> None:
    given = options(tmp_path, seconds=15.0)  # 7.5 for the first, which needs 10
    given.presets = NAMES[1:]
    assert bench(given, lambda: worker.now) == 1
    assert [row["modes"] for row in written(tmp_path)] == [{}, {}]
    assert worker.asked == [(NAMES[1], False), (NAMES[2], False)]


def test_parameters_are_filled_on_the_device_of_the_model() -> None:
    model = Decoder(CONFIG)
    bench_presets.fill(model, torch.Generator().manual_seed(0))
    values = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert values.isfinite().all() and 0.01 < values.std() < 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_refuses_without_a_gpu() -> None:
    with pytest.raises(UserError, match="needs a CUDA device"):
        bench(argparse.Namespace())
