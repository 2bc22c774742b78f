"""The training benchmark of presets: its figures on a small model, and no GPU no run."""

from __future__ import annotations

import argparse

import pytest
import torch

from rondo.errors import UserError
from rondo.models import ModelConfig
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


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_refuses_without_a_gpu() -> None:
    with pytest.raises(UserError, match="needs a CUDA device"):
        bench(argparse.Namespace())
