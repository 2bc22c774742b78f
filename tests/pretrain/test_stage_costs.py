"""Times of layers that a run keeps in its folder."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from rondo.errors import UserError
from rondo.parallel.mesh import Layout, Ranks
from rondo.parallel.pipeline import layer_flops
from rondo.pretrain import load_recipe, stage_costs
from rondo.pretrain.stage_costs import FILE, _kept_or_measured

pytestmark = pytest.mark.quick
RANKS = Ranks(0, 1, torch.device("cpu"), None)


def test_kept_times_serve_the_model_they_are_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = iter([[1.0, 2.0], [3.0, 4.0]])
    monkeypatch.setattr(stage_costs, "measure_layers", lambda *_: next(measured))
    monkeypatch.setattr(stage_costs, "layer_flops", lambda *_: [5.0, 6.0])
    recipe = load_recipe("tiny")
    wider = dataclasses.replace(recipe.model, dim=2 * recipe.model.dim)
    folder = tmp_path / "run"
    for config, seconds in ((recipe.model, [1.0, 2.0]), (recipe.model, [1.0, 2.0])):
        assert _kept_or_measured(recipe, config, folder, RANKS) == seconds
    assert _kept_or_measured(recipe, wider, folder, RANKS) == [3.0, 4.0]
    assert json.loads((folder / FILE).read_text())["seconds"] == [3.0, 4.0]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"seconds": [1'])
def test_a_damaged_file_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / FILE).write_text(text)
    recipe = load_recipe("tiny")
    with pytest.raises(UserError, match=r"layer_times\.json: damaged .* delete it"):
        _kept_or_measured(recipe, recipe.model, tmp_path, RANKS)


def test_sequence_parallel_ranks_measure_what_they_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And attention, whose work for a token grows with the length, is scaled to the whole."""
    recipe = load_recipe("tiny")
    length, seen = recipe.data.sequence_length, []
    config = dataclasses.replace(
        recipe.model, num_layers=3, pattern=["gla", "attention", "gla"], vocab_size=10
    )
    layout = property(lambda self: Layout(pp=2, cp=4))
    monkeypatch.setattr(Ranks, "layout", layout)
    monkeypatch.setattr(
        stage_costs, "measure_layers", lambda config, length, *_: seen.append(length) or [1.0] * 3
    )
    first, attention, last = _kept_or_measured(recipe, config, tmp_path, RANKS)
    assert seen == [length // 4]
    whole, part = (layer_flops(config, n)[1] for n in (length, length // 4))
    assert first == last == 1.0 and attention == pytest.approx(whole / part) and whole > part
