"""Whole runs whose samples count by their loss."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from rondo.models.loading import read_tensors
from rondo.pretrain import load_recipe, train
from rondo.tests.forks import environment

WEIGHTED = ["--reweight.strategy=linupper", "--reweight.temperature=0.4"]


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A small run on two corpora: sentences, and one word again and again."""
    folder = tmp_path_factory.mktemp("corpora")
    texts = {
        "prose": [f"The {i}th of {7 * i} men said {i * i}, and went." for i in range(400)],
        "noise": ["again " * (3 + i % 5) for i in range(400)],
    }
    for name, lines in texts.items():
        (folder / name).mkdir()
        (folder / name / "text.txt").write_text("\n\n".join(lines))
    sources = ", ".join(f"{{path: {folder / name}}}" for name in texts)
    return [
        *("--model.pattern=[attention]", "--model.dim=32", "--model.num_layers=2"),
        *("--data.sequence_length=64", "--data.micro_batch_size=8", "--schedule.name=constant"),
        "--schedule.warmup_steps=0",
        *("--checkpoint.every=3", "--steps=6", "--evals.batches=0", "--logging.tensorboard=false"),
        *(f"--data.sources=[{sources}]", f"--data.folder={folder / 'prepared'}"),
    ]


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def run(folder: Path, *options: str) -> list[dict[str, Any]]:
    """Trains in this process; its rows."""
    assert train(load_recipe("tiny", [*options, f"--output_dir={folder}"])) == 0
    return rows(folder / "tiny")


def exact(found: list[dict[str, Any]]) -> list[tuple[float, float]]:
    return [(row["loss"], row["grad_norm"]) for row in found]


def test_a_plain_warmup_is_no_reweighting_to_the_bit(options: list[str], tmp_path: Path) -> None:
    plain = run(tmp_path / "plain", *options)
    uniform = ["--reweight.strategy=uniform", "--reweight.scope=global_batch"]
    assert exact(run(tmp_path / "uniform", *options, *uniform)) == exact(plain)
    got = run(tmp_path / "weighted", *options, *WEIGHTED, "--reweight.warmup_steps=3")
    assert exact(got)[:3] == exact(plain)[:3]
    assert got[3]["loss"] == pytest.approx(plain[3]["loss"], rel=1e-6)  # unweighted, one model
    assert got[3]["grad_norm"] != pytest.approx(plain[3]["grad_norm"], rel=1e-3)
    assert not any(key.startswith("reweight/") for row in got[:3] for key in row)
    for row in got[3:]:
        masses = [row["reweight/mass/prose"], row["reweight/mass/noise"]]
        assert sum(masses) == pytest.approx(1) and masses[0] > masses[1]
        assert row["reweight/loss"] > row["loss"]  # damps low losses
        assert 1 < row["reweight/effective_samples"] < 8 < 8 * row["reweight/largest_weight"]
        assert row["reweight/lowest_loss"] < row["loss"] < row["reweight/highest_loss"]
        assert row["reweight/temperature"] == 0.4


@pytest.mark.parametrize("scope", ["micro_batch", "global_batch"])
def test_resumed_equals_uninterrupted(scope: str, options: list[str], tmp_path: Path) -> None:
    more = [*WEIGHTED, "--reweight.warmup=linear", "--reweight.warmup_steps=5"]
    more += [f"--reweight.scope={scope}", "--reweight.unit=document", "--data.micro_batch_size=4"]
    straight = run(tmp_path / "straight", *options, *more)
    run(tmp_path / "stopped", *options, *more, "--steps=3")
    resumed = run(tmp_path / "stopped", *options, *more)
    told = [{k: v for k, v in row.items() if k.startswith("reweight/")} for row in straight]
    assert [{k: v for k, v in row.items() if k in told[0]} for row in resumed] == told
    assert exact(resumed) == exact(straight)


@pytest.mark.slow
def test_two_nodes_of_two_ranks_equal_one_process(options: list[str], tmp_path: Path) -> None:
    """Each node its own torchrun, with local ranks 0 and 1."""
    expected = run(tmp_path / "alone", *options, *WEIGHTED)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    nodes = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--nnodes=2"),
                *(f"--node-rank={node}", "--nproc-per-node=2", "--master-addr=127.0.0.1"),
                *(f"--master-port={port}", "-m", "rondo.pretrain", "tiny", *options, *WEIGHTED),
                *("--data.micro_batch_size=2", f"--output_dir={tmp_path}/nodes"),
            ],
            cwd=tmp_path,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for node in range(2)
    ]
    outputs = [node.communicate(timeout=240)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(outputs)
    for one, two in zip(expected, rows(tmp_path / "nodes" / "tiny"), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)
        told = {key: value for key, value in one.items() if key.startswith("reweight/")}
        assert {key: two[key] for key in told} == pytest.approx(told, rel=1e-4)
    ends = [
        read_tensors(tmp_path / name / "tiny/checkpoints/step-000000006/model")
        for name in ("alone", "nodes")
    ]
    assert ends[0].keys() == ends[1].keys()
    for name, value in ends[0].items():
        assert torch.allclose(ends[1][name], value, rtol=1e-4, atol=1e-5), name
