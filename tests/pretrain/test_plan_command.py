"""The `rondo plan` command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rondo.launch.cli import main

RECIPE = """
name: small
model:
  vocab_size: 256
  dim: 64
  num_layers: 4
  pattern: [gated_deltanet, attention]
  mixers: {gated_deltanet: {num_heads: 4, head_dim: 16}, attention: {num_heads: 4}}
data: {sequence_length: 64, global_batch_size: 32, micro_batch_size: 1}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    path = tmp_path / "small.yaml"
    path.write_text(RECIPE)
    return str(path)


def test_tables_json_and_page(
    recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["plan", recipe, "--ranks", "16", "--parallel.tp", "2"]
    assert main([*words, "--json", "--html", str(tmp_path / "p.html")]) == 0
    data = json.loads(capsys.readouterr().out)
    layout = {"pp": 1, "dp_replicate": 1, "dp_shard": 8, "cp": 1, "tp": 2}
    assert data["layout"] == {**layout, "ranks": 16} and data["fits"]
    assert data["predicted"]["step"] > 0
    assert "<svg" in (tmp_path / "p.html").read_text()
    assert main(words) == 0
    text = capsys.readouterr().out
    assert "for a sequence of" in text and data["state_bytes"] > 0
    assert "GB received" in text and "predictions, not measurements" in text


def test_search(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", recipe, "--ranks", "2", "--node_size", "1", "--search", "--json"]
    words += ["--model.pattern", "[attention]", "--parallel.tp", "3"]  # which search replaces
    assert main(words) == 0
    plans = json.loads(capsys.readouterr().out)
    steps = [plan["predicted"]["step"] for plan in plans]
    assert len(plans) == 5 and steps == sorted(steps)


@pytest.mark.quick
def test_schedule(recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Drawn without a layout: columns, the rates where phases meet, JSON and a page."""
    words = ["plan", recipe, "--schedule", "--steps", "1000", "--optimizer.lr", "3e-4"]
    words += ["--schedule.name", "infinite_cosine", "--schedule.warmup_steps", "1%"]
    words += ["--schedule.cooldown_steps", "60%", "--schedule.decay_steps", "14%"]
    assert main([*words, "--html", str(tmp_path / "lr.html")]) == 0
    text = capsys.readouterr().out
    assert "infinite_cosine, 1,000 steps of 2,048 tokens" in text and "wrote" in text
    for step, rate in (("10", "3.0000e-04"), ("610", "1.6500e-04"), ("860", "1.6500e-04")):
        assert any(step in line and rate in line for line in text.splitlines())
    columns = [line[10:] for line in text.splitlines() if "█" in line]
    assert len(columns) == 12
    full = [sum(line[i : i + 1] == "█" for line in columns) for i in (2, 50, 80, 99)]
    assert full[0] == 12 and full[0] > full[1] > full[2] == 6 and full[3] == 1
    page = (tmp_path / "lr.html").read_text()
    assert "<polyline" in page and "3.00e-04" in page
    assert main([*words, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["borders"] == [0, 10, 610, 860, 999] and len(data["lr"]) == 1000
    assert data["lr"][310] == pytest.approx(2.325e-4)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--ranks", "16", "--parallel.tp", "3"], "parallel.tp: tp 3 = 3 does not divide 16"),
        (["--ranks", "0"], "ranks: must be at least 1, got 0"),
        (["--ranks", "many"], "ranks: expected"),
        ([], "ranks: required key"),
        (["--ranks", "2", "--search", "--model.dim", "65536"], "no layout that was tried fits 2 x"),
        (["--ranks", "8", "--hardware", "H10"], "hardware: unknown 'H10'; did you mean H100?"),
        (["--ranks", "8", "--hardwear", "H100"], "did you mean --hardware"),
        (["--ranks", "8", "--html", "/no/plan.html"], "html: no folder for /no/plan.html"),
        (["--ranks", "8", "--html", "/tmp"], "html: /tmp is a folder"),
        (["--ranks", "8", "--network_gbs", "1e9"], "must be above 0 and below 1e9, got 1000000000"),
        (["--ranks", "8", "--efficiency", "2"], "efficiency: must be above 0"),
        (["--ranks", "8", "--data.global_batch_size", "3"], "do not divide over 8"),
        (
            ["--ranks", "8", "--model.vocab_size", "0", "--data.tokenizer", "auto"],
            "model.vocab_size",
        ),
    ],
)
def test_impossible_plans_are_one_message(
    words: list[str], message: str, recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", recipe, *words]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("rondo: error: ") and message in err and out == ""


@pytest.mark.quick
def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--help"]) == 0
    text = capsys.readouterr().out
    assert "usage: rondo plan RECIPE --ranks N | --schedule" in text
    assert "--network_gbs" in text and "MI300X" in text
