"""Groups and tags of lm-eval on local files: their parts, their averages, and what is missing."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from rondo.launch.cli import main as rondo
from rondo.tests.evals.runs import write_run

pytest.importorskip("lm_eval")


@pytest.fixture(scope="module")
def blimp() -> list[str]:
    """Names of the parts of BLiMP."""
    from rondo.evals.catalog import harness_tasks

    return [name for name in harness_tasks().all_subtasks if _is_english(name)]


def _is_english(name: str) -> bool:
    return name.startswith("blimp_") and "__" not in name


def _pairs(folder: Path, names: list[str]) -> None:
    """Files with one to three pairs, under either of the two names that are looked for."""
    draw = random.Random(0)
    folder.mkdir()
    for number, name in enumerate(names):
        words = [
            ["".join(draw.choices("abcde ", k=6)) for _ in range(2)] for _ in range(1 + number % 3)
        ]
        rows = [{"sentence_good": good, "sentence_bad": bad} for good, bad in words]
        file = folder / f"{name.removeprefix('blimp_') if number % 2 else name}.jsonl"
        file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def _score(run: Path, folder: Path, task: str) -> dict[str, Any]:
    assert rondo(["eval", str(run), "--tasks", task, "--data_dir", str(folder)]) == 0
    return json.loads((run / "evals" / "step-000000010" / f"{task}.json").read_text())


def test_a_group_has_the_average_of_its_parts(tmp_path: Path, blimp: list[str]) -> None:
    assert len(blimp) == 67
    write_run(tmp_path / "run")
    _pairs(tmp_path / "data", blimp)
    found = _score(tmp_path / "run", tmp_path / "data", "blimp")
    parts = [found["results"][name]["acc,none"] for name in blimp]
    counts = [found["n-samples"][name]["original"] for name in blimp]
    assert counts == [1 + number % 3 for number in range(67)]
    # As the harness has it: every part counts alike, however many pairs it has.
    assert found["results"]["blimp"]["acc,none"] == pytest.approx(sum(parts) / 67)
    assert sum(p * n for p, n in zip(parts, counts, strict=True)) / sum(counts) != sum(parts) / 67
    assert found["groups"]["blimp"] == found["results"]["blimp"]
    assert sorted(found["group_subtasks"]["blimp"]) == blimp


def test_a_tag_is_its_tasks(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    row = {"query": "Question: Hot?", "choices": ["a", "b"], "gold": 1}
    (tmp_path / "data").mkdir()
    for name in ("arc_easy", "arc_challenge"):
        (tmp_path / "data" / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    found = _score(tmp_path / "run", tmp_path / "data", "ai2_arc")
    assert sorted(found["results"]) == ["arc_challenge", "arc_easy"]


def test_a_file_that_is_missing_is_named(
    tmp_path: Path, blimp: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "run")
    _pairs(tmp_path / "data", [name for name in blimp if name != "blimp_causative"])
    words = ["eval", str(tmp_path / "run"), "--data_dir", str(tmp_path / "data"), "--tasks"]
    assert rondo([*words, "blimp"]) == 2
    said = capsys.readouterr().err
    assert "expected one blimp_causative.jsonl or causative.jsonl" in said
    assert "blimp_causative is a part of blimp" in said
    assert rondo([*words, "flan_held_in"]) == 2
    assert "anli_r1_prompt-0 of the group flan_held_in::anli_r1_flan" in capsys.readouterr().err
    assert not (tmp_path / "run" / "evals").exists()
