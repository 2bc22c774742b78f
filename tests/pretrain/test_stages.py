"""Runs in stages: killed anywhere they end as if not, and they say what is forgotten."""

from __future__ import annotations

import json
import multiprocessing as mp
import os
import random
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from rondo.errors import UserError
from rondo.models.loading import find_checkpoint, read_tensors
from rondo.pretrain import load_recipe, train
from rondo.pretrain.data.seen import NAME
from rondo.pretrain.run_data import open_data
from rondo.pretrain.stages import stages_of, total_steps
from rondo.pretrain.train import Trainer
from rondo.tests.forks import Training

SMALL = [
    "--model.dim=32", "--model.pattern=[attention]", "--model.num_layers=1",
    "--data.sequence_length=32", "--data.micro_batch_size=4", "--data.validation_fraction=0.1",
    "--evals.batches=1", "--evals.every=2", "--checkpoint.every=2", "--checkpoint.keep=0",
    "--logging.tensorboard=false", "--schedule.warmup_steps=1", "--steps=4",
]  # fmt: skip
STAGES = """[
  {{name: one, data: {{sources: [{{path: {0}/one.jsonl}}]}}}},
  {{name: two, steps: 5, data: {{sources: [{{path: {0}/two.jsonl}}]}}, replay: {{share: 0.3,
    order: reshuffled}}, schedule: {{name: cosine, warmup_steps: 1, start_ratio: 0.1}}}},
  {{name: three, steps: 3, data: {{sources: [{{path: {0}/one.jsonl}}]}}, reset_optimizer: false,
    reset_step: false, replay: {{source: two, share: 0.5, offset: 3}}}}]"""
BEGUN_ANEW = """[
  {{name: one, data: {{sources: [{{path: {0}/one.jsonl}}]}}}},
  {{name: two, data: {{sources: [{{path: {0}/two.jsonl}}]}}, init_from: BASE,
    reset_optimizer: false, replay: {{share: 0.3, order: reshuffled}}}}]"""
BORDERS = (0, 4, 9, 12)


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two languages whose letters follow each other in opposite orders."""
    folder, draw = tmp_path_factory.mktemp("corpora"), random.Random(0)
    for name, step in (("one", 1), ("two", 25)):
        with (folder / f"{name}.jsonl").open("w") as file:
            for _ in range(300):
                letter, text = draw.randrange(26), ""
                for _ in range(60):
                    letter = (letter + (step if draw.random() < 0.9 else draw.randrange(26))) % 26
                    text += chr(97 + letter)
                file.write(json.dumps({"text": text}) + "\n")
    return folder


def options(corpora: Path, folder: Path, *more: str, stages: str = STAGES) -> list[str]:
    own = [f"--output_dir={folder}/runs", f"--data.folder={corpora}/prepared"]
    return [*SMALL, *own, f"--stages={stages.format(corpora)}", *more]


def run(corpora: Path, folder: Path, *more: str, stages: str = STAGES) -> list[dict[str, Any]]:
    """Trains in this process; the rows of metrics.jsonl."""
    recipe = load_recipe("tiny", options(corpora, folder, *more, stages=stages))
    assert train(recipe) == 0
    return rows(folder / "runs" / recipe.name)


def rows(folder: Path) -> list[dict[str, Any]]:
    """What does not depend on the time."""
    found = []
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        found.append({k: v for k, v in row.items() if k not in TIMES})
    return found


TIMES = ("time", "seconds", "save_seconds", "observe_seconds", "tokens_per_second", "mfu")
TIMES += ("memory_bytes",)


def final(folder: Path, step: int = 12) -> dict[str, torch.Tensor]:
    path = folder / "runs/tiny/checkpoints" / f"step-{step:09d}"
    return {**read_tensors(path / "model"), **read_tensors(path / "optimizer")}


def equal(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(one[name].equal(two[name]) for name in one)


@pytest.fixture(scope="module")
def straight(corpora: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("straight")
    run(corpora, folder)
    return folder


@pytest.fixture(scope="module")
def begun_anew(
    straight: Path, corpora: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    """A run whose second stage has parameters and optimizer of `straight`'s end; and its stages."""
    end = straight / "runs/tiny/checkpoints/step-000000012"
    folder, stages = tmp_path_factory.mktemp("begun_anew"), BEGUN_ANEW.replace("BASE", str(end))
    run(corpora, folder, stages=stages)
    return folder, stages


class Killed(Exception):
    pass


@pytest.mark.parametrize("step", [2, 4, 7, 9, 10])
def test_killed_anywhere_it_ends_as_if_it_had_not_been(
    step: int, straight: Path, corpora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In every stage, in its last step, and before its first."""
    kill_and_compare(step, STAGES, straight, corpora, tmp_path, monkeypatch)


@pytest.mark.parametrize("step", [3, 4, 5, 7])
def test_killed_around_a_stage_that_begins_with_another_run(
    step: int,
    begun_anew: tuple[Path, str],
    corpora: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In the last step before it, before its first, and in it before and after a checkpoint."""
    folder, stages = begun_anew
    kill_and_compare(step, stages, folder, corpora, tmp_path, monkeypatch, last=8)


def kill_and_compare(
    step: int,
    stages: str,
    straight: Path,
    corpora: Path,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    last: int = 12,
) -> None:
    """A run in `folder` that is killed before a step and started again ends as `straight` did."""
    whole = Trainer.step

    def killed(self: Trainer, number: int, batches: list) -> tuple:
        if number == step:
            raise Killed
        return whole(self, number, batches)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", killed)
        with pytest.raises(Killed):
            run(corpora, folder, stages=stages)
    assert run(corpora, folder, stages=stages) == rows(straight / "runs/tiny")
    assert equal(final(folder, last), final(straight, last))
    record = f"runs/tiny/checkpoints/step-{last:09d}/{NAME}"
    assert (folder / record).read_text() == (straight / record).read_text()


def train_and_die(words: list[str], step: int) -> None:
    """Trains until the kernel ends the process before a step."""
    whole = Trainer.step

    def killed(self: Trainer, number: int, batches: list) -> tuple:
        if number == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(self, number, batches)

    Trainer.step = killed  # type: ignore[method-assign]
    train(load_recipe("tiny", words))


def test_killed_by_the_system_the_record_is_that_of_the_checkpoint(
    straight: Path, corpora: Path, tmp_path: Path
) -> None:
    process = mp.get_context("forkserver").Process(
        target=train_and_die, args=(options(corpora, tmp_path), 7)
    )
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    newest = find_checkpoint(tmp_path / "runs/tiny")
    record = json.loads((newest / NAME).read_text())
    step = int(newest.name[5:])
    assert record["samples"] == step * 8 and step in (4, 6)
    assert run(corpora, tmp_path) == rows(straight / "runs/tiny")
    assert equal(final(tmp_path), final(straight))


def test_goes_on_in_another_layout_in_the_middle_of_a_stage(
    straight: Path, corpora: Path, tmp_path: Path
) -> None:
    """From after step 6 on one rank, on two that each hold half of every tensor and batch."""
    runs = tmp_path / "runs/tiny"
    for step in (4, 6):
        name = f"checkpoints/step-{step:09d}"
        shutil.copytree(straight / "runs/tiny" / name, runs / name)
    shutil.copy(straight / "runs/tiny/metrics.jsonl", runs)
    codes, output = Training(tmp_path, 2, "tiny", *options(corpora, tmp_path)).end()
    assert codes == [0, 0], output
    for found, wanted in zip(rows(runs), rows(straight / "runs/tiny"), strict=True):
        assert found.keys() == wanted.keys()
        assert found["targets"] == wanted["targets"]
        for key, value in wanted.items():
            assert found[key] == (
                value if key == "stage" else pytest.approx(value, rel=1e-4, abs=1e-5)
            ), key
    last = "checkpoints/step-000000012"
    kept = (straight / "runs/tiny" / last / NAME).read_text()
    assert (runs / last / NAME).read_text() == kept


def test_metrics_name_the_stage_and_follow_every_domain(straight: Path) -> None:
    found = rows(straight / "runs/tiny")
    assert [row["stage"] for row in found] == ["one"] * 4 + ["two"] * 5 + ["three"] * 3
    measured = [row for row in found if "validation/loss" in row]
    assert [row["step"] for row in measured] == [1, 3, 5, 7, 8, 9, 11]  # every 2, and stages' ends
    assert all(f"validation/{name}/loss" in row for row in measured for name in ("one", "two"))
    assert found[0]["validation_before/one/bits_per_byte"] > 0
    end_of_one, end_of_two = found[3], found[8]
    assert "forgetting/one" not in end_of_one and "forgetting/two" not in end_of_two
    lost = end_of_two["validation/one/loss"] - end_of_one["validation/one/loss"]
    assert end_of_two["forgetting/one"] == lost
    assert end_of_two["adaptation/two"] == end_of_two["validation/two/loss"]
    lost = found[11]["validation/two/loss"] - end_of_two["validation/two/loss"]
    assert found[11]["forgetting/two"] == lost and "forgetting/one" not in found[11]
    plan = json.loads((straight / "runs/tiny/stages.json").read_text())
    assert plan["steps"] == 12 and [s["domain"] for s in plan["stages"]] == ["one", "two", "one"]


def test_the_loss_is_over_the_targets_that_the_data_has(straight: Path, corpora: Path) -> None:
    """Documents end within sequences, where nothing is predicted. (On two ranks: above.)"""
    recipe = load_recipe("tiny", options(corpora, straight))
    training, _ = open_data(recipe, straight / "runs/tiny")
    found = rows(straight / "runs/tiny")
    for row in found:
        first = 8 * row["step"]
        targets = training.batch(range(first, first + 8)).targets
        assert row["targets"] == int((targets >= 0).sum()) < 8 * 32
        assert row["tokens"] == (row["step"] + 1) * 8 * 32


def test_every_stage_ends_with_a_checkpoint_and_its_optimizer_begins_anew(
    straight: Path, corpora: Path, tmp_path: Path
) -> None:
    saved = sorted(path.name for path in (straight / "runs/tiny/checkpoints").iterdir())
    assert [int(name[5:]) for name in saved] == [2, 4, 6, 8, 9, 10, 12]
    assert final(straight, 4)["head.weight.step"] == 4
    assert final(straight, 6)["head.weight.step"] == 2  # stage two has none of stage one's
    assert final(straight, 12)["head.weight.step"] == 8  # stage three goes on with stage two's


def test_a_reset_optimizer_leaves_weights_as_they_are(
    straight: Path, corpora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, seen = Trainer.step, []

    def look(self: Trainer, number: int, batches: list) -> tuple:
        if number == 4:
            tensors = self.model.optimizer_tensors()
            model = {k: v.detach().clone() for k, v in self.model.model_tensors().items()}
            seen.append((model, any(tensor.any() for tensor in tensors.values())))
        return whole(self, number, batches)

    monkeypatch.setattr(Trainer, "step", look)
    run(corpora, tmp_path)
    before = read_tensors(straight / "runs/tiny/checkpoints/step-000000004/model")
    [(model, moments)] = seen
    assert equal(model, before) and not moments


def test_a_schedule_that_is_not_reset_spans_both_stages(corpora: Path, tmp_path: Path) -> None:
    recipe = load_recipe("tiny", options(corpora, tmp_path))
    assert total_steps(recipe) == 12
    one, two, three = stages_of(recipe)
    assert (one.start, two.start, three.start) == BORDERS[:3]
    assert (two.schedule_start, two.schedule_steps) == (4, 8)
    assert (three.schedule_start, three.schedule_steps) == (4, 8)
    assert three.schedule is two.schedule


def test_a_stage_begins_with_the_parameters_of_another_run(
    straight: Path, corpora: Path, tmp_path: Path
) -> None:
    """Which kind of layout wrote them does not matter (see test_layout_checkpoints)."""
    base = straight / "runs/tiny/checkpoints/step-000000012"
    stages = """[
      {{name: one, data: {{sources: [{{path: {0}/one.jsonl}}]}}, steps: 2}},
      {{name: two, data: {{sources: [{{path: {0}/two.jsonl}}]}}, steps: 1, init_from: BASE,
        reset_optimizer: false}}]""".replace("BASE", str(base))
    run(corpora, tmp_path, "--optimizer.lr=1e-12", stages=stages)
    there, here = final(straight), final(tmp_path, 3)
    assert here["head.weight.step"] == there["head.weight.step"] + 1
    assert (here["head.weight"] - there["head.weight"]).abs().max() < 1e-6
    first = """[{{name: two, data: {{sources: [{{path: {0}/two.jsonl}}]}}, steps: 1,
        init_from: BASE}}]""".replace("BASE", str(base))
    run(corpora, tmp_path, "--optimizer.lr=1e-12", "--name=first", stages=first)
    path = find_checkpoint(tmp_path / "runs/first")
    head = read_tensors(path / "model")["head.weight"]
    assert read_tensors(path / "optimizer")["head.weight.step"] == 1
    assert (head - there["head.weight"]).abs().max() < 1e-6


def test_a_stage_can_be_added_to_a_run_that_has_ended(
    straight: Path, corpora: Path, tmp_path: Path
) -> None:
    """Without stages first, with them after: the run goes on as if all had been planned."""
    one = [f"--data.sources=[{{path: {corpora}/one.jsonl}}]", "--stages=[]"]
    run(corpora, tmp_path, *one)
    found = run(corpora, tmp_path)
    wanted = rows(straight / "runs/tiny")
    assert (
        found[4:] == [row if row["step"] != 4 else found[4] for row in wanted[4:]]
        and found[4]["loss"] == wanted[4]["loss"]
    )
    assert equal(final(tmp_path), final(straight))


def test_a_run_goes_on_with_another_at_its_step(
    straight: Path, corpora: Path, tmp_path: Path
) -> None:
    """In a folder of its own, with the other's stages first and its last checkpoint to resume."""
    end = straight / "runs/tiny/checkpoints/step-000000004"
    found = run(corpora, tmp_path, f"--checkpoint.resume={end}")
    wanted = rows(straight / "runs/tiny")[4:]
    assert [(row["step"], row["loss"]) for row in found] == [
        (row["step"], row["loss"]) for row in wanted
    ]
    assert equal(final(tmp_path), final(straight))
    record = f"runs/tiny/checkpoints/step-000000012/{NAME}"
    assert (tmp_path / record).read_text() == (straight / record).read_text()
    other = STAGES.replace("one.jsonl", "two.jsonl", 1)
    with pytest.raises(UserError, match="was trained on other data"):
        run(corpora, tmp_path, f"--checkpoint.resume={end}", "--name=changed", stages=other)


def test_another_run_is_replayed_and_its_language_followed(
    straight: Path, corpora: Path, tmp_path: Path
) -> None:
    """A run of one stage that begins with another's parameters and replays it; forgetting is
    counted from its beginning. What it replays stays as it was while the other goes on."""
    other = tmp_path / "other"
    shutil.copytree(straight / "runs/tiny", other)
    for path in (other / "checkpoints").iterdir():
        if int(path.name[5:]) > 8:
            shutil.rmtree(path)
    stages = """[{{name: new, data: {{sources: [{{path: {0}/two.jsonl}}]}}, steps: STEPS,
      init_from: OTHER, replay: {{share: 0.5, source: OTHER}}}}]""".replace("OTHER", str(other))
    straight_rows = run(corpora, tmp_path, "--name=whole", stages=stages.replace("STEPS", "4"))
    loss = straight_rows[0]["validation_before/other/loss"]
    last = straight_rows[-1]
    assert last["forgetting/other"] == last["validation/other/loss"] - loss
    run(corpora, tmp_path, "--name=parts", "--schedule.name=constant",
        stages=stages.replace("STEPS", "2"))  # fmt: skip
    for step in (9, 12):
        name = f"step-{step:09d}"
        shutil.copytree(straight / "runs/tiny/checkpoints" / name, other / "checkpoints" / name)
    run(corpora, tmp_path, "--name=parts", "--schedule.name=constant",
        stages=stages.replace("STEPS", "4"))  # fmt: skip
    records = [
        (find_checkpoint(tmp_path / "runs" / name) / NAME).read_text()
        for name in ("whole", "parts")
    ]
    assert records[0] == records[1]
