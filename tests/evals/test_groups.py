"""Tasks of lm-eval on local files: parts and averages of groups, examples, what is missing."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from rondo.errors import UserError
from rondo.launch.cli import main as rondo
from rondo.pretrain.data import load_tokenizer
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


SUMS = [{"question": f"{n} + 1?", "answer": f"#### {n + 1}"} for n in range(9)]


def _find(folder: Path, task: str, **files: list[dict[str, Any]]) -> Any:
    from rondo.evals.catalog import Catalog, Sources

    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return Catalog(Sources(load_tokenizer("bytes"), folder)).find(task)


@pytest.mark.parametrize("kind", ["train", "fewshot"])
def test_examples_are_of_a_file_of_their_own(tmp_path: Path, kind: str) -> None:
    task = _find(tmp_path, "gsm8k", gsm8k=SUMS[:2], **{f"gsm8k_{kind}": SUMS[2:]})
    prompt = task.fewshot_context(task.eval_docs[0], num_fewshot=5)
    assert prompt.count("Question:") == 6 and prompt.endswith("Question: 0 + 1?\nAnswer:")
    assert "Question: 1 + 1?" not in prompt and prompt.count("0 + 1?") == 1


def test_examples_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"one gsm8k_train.jsonl or gsm8k_fewshot.jsonl in .* 5 ex"):
        _find(tmp_path, "gsm8k", gsm8k=SUMS)
    with pytest.raises(UserError, match=r"gsm8k_train.jsonl has 4 examples; gsm8k shows 5"):
        _find(tmp_path, "gsm8k", gsm8k_train=SUMS[:4])
    with pytest.raises(UserError, match=r"gsm8k_train.jsonl has the fields x; .*'question' is und"):
        _find(tmp_path, "gsm8k", gsm8k_train=[{"x": 1}] * 5)


def test_examples_in_the_task_itself_need_no_file(tmp_path: Path) -> None:
    task = _find(tmp_path, "gsm8k_cot", gsm8k_cot=SUMS[:1])
    prompt = task.fewshot_context(task.eval_docs[0], num_fewshot=8)
    assert prompt.count("Q: ") == 9 and "15 trees" in prompt


def test_fields_that_are_missing_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=r"copa.jsonl has the fields premise; .* no 'question'"):
        _find(tmp_path, "copa", copa=[{"premise": "a"}])
    with pytest.raises(UserError, match=r"data_dir: squadv2 reads a data set of its own"):
        _find(tmp_path, "squadv2", squadv2=SUMS)
    write_run(tmp_path / "run")
    (tmp_path / "arc_easy.jsonl").write_text('{"context": "a", "answer": "b"}\n')
    words = ["eval", str(tmp_path / "run"), "--tasks", "arc_easy", "--data_dir", str(tmp_path)]
    assert rondo(words) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "has the fields context, answer; arc_easy needs the fields of its own" in said
    assert "'question' is undefined" in said
