"""The continual experiment, at a size that tells nothing but that it runs."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rondo.evals import continual
from rondo.evals.continual import ContinualConfig, contest, plans
from rondo.pretrain import load_recipe
from rondo.pretrain.data import Batch
from rondo.pretrain.stages import stages_of
from rondo.tests.pretrain.test_stages import corpora  # noqa: F401


def noting_device(function: Callable, used: list[torch.device]) -> Callable:
    """`function`, whose second argument is a device, and is kept in `used`."""

    def noted(first: Any, device: torch.device, *others: Any) -> Any:
        used.append(device)
        return function(first, device, *others)

    return noted


@pytest.mark.quick
def test_its_runs_are_of_one_budget(tmp_path: Path) -> None:
    config = ContinualConfig("stdlib-english", "stdlib-code", steps=10, output=str(tmp_path))
    recipes = {}
    for name in ("base", "infinite-base"):
        (tmp_path / name).mkdir()  # what is replayed has to be there
    for name, words in plans(config).items():
        recipes[name] = load_recipe(config.recipe, ["--steps=10", *words, f"--name={name}"])
    lengths = {name: stages_of(recipe)[-1].end for name, recipe in recipes.items()}
    assert lengths.pop("union") == 20 and set(lengths.values()) == {10}
    [stage] = stages_of(recipes["not-rewarmed"])
    assert stage.schedule.peak_ratio == 0.1 and stage.replay is not None
    assert stage.replay.share == 0.25


def test_all_of_it(
    corpora: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device, used = torch.device("cpu", 0), []  # any that `load` and `to` have not by themselves
    monkeypatch.setattr(continual, "pick_device", {"auto": "cpu:0"}.__getitem__)
    for owner, name in ((continual, "load"), (Batch, "to")):
        monkeypatch.setattr(owner, name, noting_device(getattr(owner, name), used))
    overrides = [
        "--model.dim=16", "--model.num_layers=1", "--model.pattern=[attention]",
        "--model.mixers.attention.num_heads=2", "--data.sequence_length=32",
        "--data.global_batch_size=4", "--data.micro_batch_size=4", "--evals.batches=1",
        "--logging.tensorboard=false", f"--data.folder={tmp_path}/data",
    ]  # fmt: skip
    config = ContinualConfig(
        str(corpora / "one.jsonl"),
        str(corpora / "two.jsonl"),
        steps=5,
        output=str(tmp_path / "runs"),
        batches=2,
        overrides=" ".join(overrides),
    )
    found = contest(config)
    assert list(found) == [*plans(config)]
    assert json.loads((tmp_path / "runs/continual.json").read_text()) == found
    last = json.loads((tmp_path / "runs/base/metrics.jsonl").read_text().splitlines()[-1])
    assert found["base"]["first"] == pytest.approx(last["validation/bits_per_byte"], rel=0.1)
    assert len(used) == 9 * 2 * (1 + 2) and set(used) == {device}  # runs, languages, batches
    page = (tmp_path / "runs/continual.html").read_text()
    assert page.count("<polyline") == 4 and "<th>one.jsonl forgotten</th>" in page
    names = [f"{name}.jsonl{which}" for name in ("one", "two") for which in ("", ", union")]
    assert all(f">{name}</span>" in page for name in names)
    # Percents are written below their own points.
    points = re.findall(r'points="([\d., ]+)"', page)[0].split()
    ticks = dict(re.findall(r'<text x="([\d.]+)" y="\d+" text-anchor="middle">(\d+)<', page))
    assert [ticks.pop(point.split(",")[0]) for point in points] == ["0", "5", "25", "50"]
    assert not ticks
