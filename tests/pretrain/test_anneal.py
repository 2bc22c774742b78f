"""`rondo anneal`: a branch that goes on as the run would, with a rate that falls."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import shutil
from pathlib import Path

import pytest

from rondo.launch.cli import main
from rondo.models.loading import find_checkpoint, read_tensors
from rondo.pretrain.anneal import AnnealConfig, branch
from rondo.pretrain.parse import load_recipe
from rondo.pretrain.run_data import open_data
from rondo.pretrain.stages import stages_of
from rondo.pretrain.train import Trainer
from rondo.tests.pretrain.test_stages import Killed, equal, rows, run
from rondo.tests.pretrain.test_stages import corpora as corpora

INFINITE = [
    "--schedule.name=infinite_cosine", "--schedule.cooldown_steps=2", "--steps=8",
    "--optimizer.lr=1e-3",
]  # fmt: skip


def digests(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def base(corpora: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without stages, and one whose second stage replays."""
    folder = tmp_path_factory.mktemp("base")
    run(corpora, folder, *INFINITE, f"--data.sources=[{{path: {corpora}/one.jsonl}}]", stages="[]")
    run(corpora, folder, "--name=staged")
    return folder / "runs"


def test_a_branch_decays_from_the_rate_at_its_step_and_leaves_the_run_alone(
    base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = digests(base / "tiny")
    assert main(["anneal", str(base / "tiny"), "--at", "6", "--steps", "4"]) == 0
    assert digests(base / "tiny") == before
    found = rows(base / "tiny-anneal-6")
    assert [(row["step"], row["stage"]) for row in found] == [(n, "anneal") for n in range(6, 10)]
    rates = [1e-3 * 0.55 * (0.1 / 0.55) ** (y / 4) for y in range(4)]
    assert [row["lr"] for row in found] == pytest.approx(rates)
    parts = [base / "tiny/checkpoints/step-000000006", base / "tiny-anneal-6/checkpoints"]
    moments = [
        read_tensors(path / "optimizer")["head.weight.step"].item()
        for path in (parts[0], parts[1] / "step-000000010")
    ]
    assert moments == [6, 10]
    # What it reads is what the run read: its first step is the run's own at a known rate.
    assert found[0]["loss"] == rows(base / "tiny")[6]["loss"]
    record = json.loads((parts[1] / "step-000000010/samples.json").read_text())
    assert [stage["sources"][0]["samples"] for stage in record["stages"]] == [[0, 48], [48, 80]]


def test_another_branch_of_the_same_name_is_refused(
    base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also when it is only to be written; what is there stays as it is."""
    given = {"--at": "6", "--steps": "4", "--name": "same"}

    def anneal(**changed: str) -> int:
        options = given | {f"--{key}": value for key, value in changed.items()}
        return main(["anneal", str(base / "tiny"), *itertools.chain(*options.items())])

    assert anneal() == 0
    before = digests(base / "same")
    for changed, message in (
        ({"steps": "6"}, r"\(stages\.1\.steps: 4 there, 6 now\); give another --name"),
        ({"shape": "cosine"}, r'decay_shape: "exponential" there, "cosine" now\);'),
        ({"final_ratio": "0.05"}, r"schedule\.final_ratio: 0\.1 there, 0\.05 now\);"),
        ({"at": "4"}, r"\(steps: 6 there, 4 now; stages\.0\.steps: .*000000004\" now\);"),
        ({"steps": "5", "write": str(base / "never.yaml")}, "4 there, 5 now"),
    ):
        assert anneal(**changed) == 2
        assert re.search(message, capsys.readouterr().err)
    assert digests(base / "same") == before and not (base / "never.yaml").exists()


def test_a_branch_of_a_stage_goes_on_in_its_replay(base: Path) -> None:
    recipe = branch(AnnealConfig(str(base / "staged"), at=8, steps=2, shape="1-sqrt"))
    one, two, anneal = recipe.stages
    assert (one.steps, two.steps, anneal.steps, recipe.name) == (4, 4, 2, "staged-anneal-8")
    assert two.replay is not None and anneal.replay is not None
    assert anneal.replay.offset == 10  # 0.3 of 32, rounded
    assert anneal.schedule is not None and anneal.schedule.decay_shape == "1-sqrt"
    words = ["anneal", str(base / "staged"), "--at", "8", "--steps", "2", "--shape", "1-sqrt"]
    assert main(words) == 0
    found = rows(base / "staged-anneal-8")
    assert len(found) == 2 and "forgetting/one" in found[-1]
    path = base / "staged-anneal-8/checkpoints/step-000000010/samples.json"
    *_, two, anneal = json.loads(path.read_text())["stages"]
    assert (two["replay"]["samples"], anneal["replay"]["of"]) == (10, 32)
    assert anneal["replay"]["source"] == "one" and anneal["replay"]["samples"] == 5
    ends = [stage["sources"][0]["samples"] for stage in (two, anneal)]
    assert ends == [[0, 22], [22, 33]]


NEW = "name: new, data: {{sources: [{{path: {0}/two.jsonl}}]}}"
EARLIER = (
    "{{name: one, steps: 2}}, {{name: two, steps: 2, data: {{sources: [{{path: {0}/two.jsonl}}]}}}}"
)
FROM_OTHER = "replay: {{source: OTHER, share: 0.5, order: ORDER}}"
REPLAYS = {
    "run": f"{NEW}, steps: 8, {FROM_OTHER}",
    "again": f"{NEW.replace('new', 'begun')}, steps: 4, {FROM_OTHER}}}}}, {{{{{NEW}, steps: 4, "
    f"{FROM_OTHER}",
    "earlier": f"{NEW}, steps: 4, replay: {{{{share: 0.5, order: ORDER}}}}",
    "list": f"{NEW}, steps: 4, replay: {{{{source: [two, OTHER], share: [0.25, 0.25], "
    "offset: [1, 9], order: ORDER}}",
}


def replaying(kind: str, order: str, base: Path, corpora: Path, folder: Path) -> Path:
    """A run of 8 steps that replays half of its samples; another run has gone on since."""
    other = folder / "other"
    shutil.copytree(base / "tiny", other)
    newest = other / "checkpoints/step-000000008"
    shutil.rmtree(newest)
    before = "" if kind in ("run", "again") else f"{EARLIER}, "
    stages = f"[{before}{{{{{REPLAYS[kind]}}}}}]".replace("OTHER", str(other))
    one = f"--data.sources=[{{path: {corpora}/one.jsonl}}]"
    quick = ["--evals.every=0", "--logging.norms_every=0", "--name=run", one]
    run(corpora, folder, *quick, stages=stages.replace("ORDER", order))
    shutil.copytree(base / "tiny/checkpoints/step-000000008", newest)
    return folder / "runs/run"


@pytest.mark.parametrize(
    ("kind", "order"),
    [
        *(("run", "original"), ("again", "original")),
        *(("earlier", "reshuffled"), ("list", "reshuffled")),
    ],
)
def test_a_branch_replays_what_the_run_would_and_can_be_killed(
    kind: str,
    order: str,
    base: Path,
    corpora: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """From another run, from it in a second stage, which goes on in it, from all of two earlier
    stages, and from both kinds by shares."""
    there = replaying(kind, order, base, corpora, tmp_path)
    words = ["anneal", str(there), "--at", "6", "--steps", "4", "--name"]
    assert main([*words, "whole"]) == 0
    whole = there.parent / "whole"
    assert rows(whole)[0]["loss"] == rows(there)[6]["loss"]
    read = [open_data(load_recipe(each / "recipe.yaml"), each)[0] for each in (there, whole)]
    batches = [[data.batch(range(n, n + 8)).tokens for n in range(0, 64, 8)] for data in read]
    assert all(a.equal(b) for a, b in zip(*batches, strict=True))
    step = Trainer.step

    def killed(self: Trainer, number: int, micro_batches: list) -> tuple:
        if number == 9:
            raise Killed
        return step(self, number, micro_batches)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", killed)
        with pytest.raises(Killed):
            main([*words, "killed"])
    assert main([*words, "killed"]) == 0
    assert rows(there.parent / "killed") == rows(whole)
    ends = [find_checkpoint(there.parent / name) for name in ("whole", "killed")]
    for part in ("model", "optimizer"):
        assert equal(*(read_tensors(end / part) for end in ends))


def test_after_all_that_was_seen_a_branch_begins_again(
    base: Path, corpora: Path, tmp_path: Path
) -> None:
    """A run that has replayed everything can still be annealed."""
    stages = f"[{EARLIER}, {{{{{NEW}, steps: 4, replay: {{{{source: two, share: 0.5}}}}}}}}]"
    one = f"--data.sources=[{{path: {corpora}/one.jsonl}}]"
    run(corpora, tmp_path, "--evals.batches=0", one, stages=stages)
    recipe = branch(AnnealConfig(str(tmp_path / "runs/tiny"), at=8, steps=2))
    replay = recipe.stages[-1].replay
    assert replay is not None and (replay.source, replay.offset) == ("two", 0)


def test_a_recipe_to_launch(base: Path, tmp_path: Path) -> None:
    path = tmp_path / "branch.yaml"
    words = ["anneal", str(base / "tiny"), "--name", "other", "--write", str(path)]
    assert main([*words, "--steps", "50%", "--final_ratio", "0.2"]) == 0
    recipe = load_recipe(path)
    assert recipe.name == "other" and stages_of(recipe)[-1].end == 12
    assert not (base / "other").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--at", "5"], r"no checkpoint after step 5 .steps: 2, 4, 6, 8.; the nearest is 4"),
        (["--final_ratio", "0.9"], "below the learning rate after step 8, which is 0.55"),
        (["--name", "tiny"], "'tiny' is the run itself"),
        (["--shape", "square"], "shape: expected one of exponential, linear"),
        (["--steps", "2 hours"], r"stages\.1\.steps: expected steps"),
    ],
)
def test_bad_input_is_named(
    words: list[str], message: str, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["anneal", str(base / "tiny"), *words]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert main(["anneal", str(base)]) == 2
    assert "is not the folder of a run" in capsys.readouterr().err
