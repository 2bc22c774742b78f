"""The forgetting matrix of real runs: it tells what they measured, however they began."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rondo.evals.forgetting import report
from rondo.launch.cli import main
from rondo.pretrain import load_recipe
from rondo.pretrain.observe import Observer
from rondo.tests.pretrain.test_stages import corpora as corpora
from rondo.tests.pretrain.test_stages import options, rows, run

TWO = "{{name: two, steps: 2, data: {{sources: [{{path: {0}/two.jsonl}}]}}}}"
BOTH = f"[{{{{name: one, data: {{{{sources: [{{{{path: {{0}}/one.jsonl}}}}]}}}}}}}}, {TWO}]"
THREE = f"{BOTH[:-1]}, {TWO.replace('name: two', 'name: more')}]"


def one(corpora: Path) -> list[str]:
    return [f"--data.sources=[{{path: {corpora}/one.jsonl}}]", "--stages=[]"]


def matrix_as_measured(folder: Path) -> dict[str, Any]:
    """What `rondo forgetting` tells; its last row is that of the run's last row."""
    [found] = report([folder])
    last = rows(folder)[-1]
    for name, lost in zip(found["domains"], found["loss"]["forgetting"][-1], strict=True):
        assert lost == last.get(f"forgetting/{name}"), name
    assert any(lost is not None for lost in found["loss"]["forgetting"][-1])
    assert found["finished"] == [True] * len(found["stages"])
    return found


def test_a_stage_added_to_a_run_without(corpora: Path, tmp_path: Path) -> None:
    run(corpora, tmp_path, *one(corpora))
    found = run(corpora, tmp_path, stages=BOTH)
    told = matrix_as_measured(tmp_path / "runs/tiny")
    begun = [found[4][f"validation_before/{name}/loss"] for name in ("one", "two")]
    assert told["stages"] == ["one", "two"] and told["after_steps"] == [4, 6]
    assert told["loss"]["before"] == [None, None] and told["loss"]["matrix"][0] == begun


@pytest.mark.parametrize("staged", [True, False])
def test_going_on_with_another_run(staged: bool, corpora: Path, tmp_path: Path) -> None:
    """In a folder of its own, where only the rows of the new stage are."""
    run(corpora, tmp_path, "--name=base", *([] if staged else one(corpora)), stages=BOTH)
    end = tmp_path / "runs/base/checkpoints/step-000000004"
    found = run(corpora, tmp_path, f"--checkpoint.resume={end}", stages=BOTH)
    assert found[0]["step"] == 4
    told = matrix_as_measured(tmp_path / "runs/tiny")
    assert told["loss"]["before"] == [None, None]
    assert [row[0] is None for row in told["loss"]["matrix"]] == [False, False]
    if staged:
        [whole] = report([tmp_path / "runs/base"])
        assert told["loss"]["forgetting"] == whole["loss"]["forgetting"]
        assert told["bits_per_byte"]["forgetting"] == whole["bits_per_byte"]["forgetting"]
        assert told["loss"]["matrix"][0] == [whole["loss"]["matrix"][0][0], None]


def test_a_branch_that_is_annealed(
    corpora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(corpora, tmp_path, stages=BOTH)
    assert main(["anneal", str(tmp_path / "runs/tiny"), "--steps", "2"]) == 0
    told = matrix_as_measured(tmp_path / "runs/tiny-anneal-6")
    assert told["stages"] == ["one", "two", "anneal"] and told["after_steps"] == [4, 6, 8]
    page = (tmp_path / "runs/tiny-anneal-6/forgetting.html").read_text()
    assert "(before)" not in page and "<th>one</th>" in page
    capsys.readouterr()


def test_what_a_run_began_with_is_told_once(corpora: Path, tmp_path: Path) -> None:
    """It holds when the run is started again, here with one more stage."""
    run(corpora, tmp_path, "--name=base", stages=BOTH)
    end = tmp_path / "runs/base/checkpoints/step-000000004"
    run(corpora, tmp_path, f"--checkpoint.resume={end}", stages=BOTH)
    before = matrix_as_measured(tmp_path / "runs/tiny")
    found = run(corpora, tmp_path, f"--checkpoint.resume={end}", stages=THREE)
    assert [row["step"] for row in found if "learnt/one/loss" in row] == [4]
    told = matrix_as_measured(tmp_path / "runs/tiny")
    assert told["loss"]["matrix"][:2] == before["loss"]["matrix"]
    assert told["stages"] == ["one", "two", "more"]


@pytest.mark.quick
def test_losses_alone_that_an_older_checkpoint_keeps(tmp_path: Path) -> None:
    recipe = load_recipe("tiny", options(tmp_path, tmp_path, stages=BOTH))
    observer: Any = Observer(recipe, *[None] * 2, {}, [])  # type: ignore[arg-type]
    state: dict[str, Any] = {"learnt": {"one": 1.5}}
    observer.first(4, state)
    scores = {name: {"loss": 2.0, "bits_per_byte": 3.0} for name in ("one", "two")}
    found = observer.domains.observe(5, scores, state["learnt"])
    assert found == {"forgetting/one": 0.5, "adaptation/two": 2.0}
    assert state["learnt"] == {"one": {"loss": 1.5}, "two": {**scores["two"], "step": 6}}
