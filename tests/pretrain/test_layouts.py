"""The same run from the command line on one process and on several layouts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rondo.tests.forks import Training

pytestmark = pytest.mark.slow

HEADS = {
    "attention": {"num_heads": 4},
    "mamba2": {"head_dim": 16, "state_dim": 16},
    "retnet": {"num_heads": 4},
    "hgrn2": {"head_dim": 8},
    "deltanet": {"head_dim": 8},
    "gated_deltanet": {"head_dim": 8, "num_heads": 4},
}
OPTIONS = [
    "--model.dim=32",
    f"--model.mixers={json.dumps(HEADS)}",
    "--data.sequence_length=64",
    "--data.micro_batch_size=2",
    "--evals.batches=1",
    "--logging.tensorboard=false",
    "--logging.norms_every=10",
    "--schedule.name=constant",
]
LAYOUTS = {
    "one": [],
    "tp2-cp2": ["--parallel.tp=2", "--parallel.cp=2", "--data.micro_batch_size=4"],
    "pp2-dp2": ["--parallel.pp=2", "--parallel.dp_shard=2"],
}


def run(folder: Path, data: Path, layout: str, steps: int) -> list[dict[str, float]]:
    """Trains up to `steps` steps, going on from what `folder` has; the rows of its metrics."""
    ranks = 1 if layout == "one" else 4
    words = [*OPTIONS, *LAYOUTS[layout], f"--data.folder={data}", f"--steps={steps}"]
    codes, output = Training(folder, ranks, "tiny", *words).end(timeout=400)
    assert set(codes) == {0}, output
    return [json.loads(line) for line in (folder / "runs/tiny/metrics.jsonl").open()]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, data: Path) -> list[dict[str, float]]:
    return run(tmp_path_factory.mktemp("one"), data, "one", 30)


@pytest.mark.parametrize("layout", ["tp2-cp2", "pp2-dp2"])
def test_losses_agree_over_thirty_steps(
    layout: str, straight: list[dict[str, float]], data: Path, tmp_path: Path
) -> None:
    rows = run(tmp_path, data, layout, 30)
    assert len(rows) == 30
    for row, expected in zip(rows, straight, strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-4), row["step"]
        assert row["tokens"] == expected["tokens"]
    for name in ("validation/loss", "activation_rms/06", "state_rms/00"):
        row, expected = (r[29 if "loss" in name else 9][name] for r in (rows, straight))
        # Each rank's stretch ends in a state of its own; the other figures are the same.
        assert row == pytest.approx(expected, rel=0.5 if "state" in name else 1e-3), name


def test_a_run_goes_on_under_other_layouts(
    straight: list[dict[str, float]], data: Path, tmp_path: Path
) -> None:
    """And a pipeline is cut as when it first started: what layers took then is kept."""
    times, kept = tmp_path / "runs/tiny/layer_times.json", ""
    for steps, layout in ((6, "pp2-dp2"), (12, "tp2-cp2"), (18, "one")):
        rows = run(tmp_path, data, layout, steps)
        assert len(rows) == steps
        kept = kept or times.read_text()
        assert times.read_text() == kept
    assert min(json.loads(kept)["seconds"]) > 0
    for row, expected in zip(rows, straight, strict=False):
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-4), row["step"]
