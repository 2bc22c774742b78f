"""The benchmark of weighted steps: weights in every one of them, and nothing left behind."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest

from rondo.pretrain import load_recipe
from rondo.pretrain.bench_reweight import contest, summary
from rondo.pretrain.train import Trainer
from rondo.tests.pretrain.test_stages import SMALL
from rondo.tests.pretrain.test_stages import corpora as corpora


@pytest.mark.quick
def test_summary() -> None:
    found = summary({"plain": [1.0, 2.0, 4.0], "weighted": [1.1, 2.0, 5.0]})
    assert found["rounds"] == 3 and found["plain_seconds"] == found["weighted_seconds"] == 2.0
    assert found["extra_time"] == pytest.approx(0.1)
    assert found["extra_time_of_bests"] == pytest.approx(0.1)


@pytest.mark.parametrize("strategy", ["uniform", "quadratic"])
def test_every_other_step_is_weighted_in_spite_of_a_warmup(
    strategy: str,
    corpora: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole, seen = Trainer.step, []

    def look(self: Trainer, number: int, batches: list) -> tuple[dict[str, Any], bool]:
        row, stop = whole(self, number, batches)
        seen.append((number, "reweight/loss" in row))
        return row, stop

    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    monkeypatch.setattr(Trainer, "step", look)
    own = [f"--data.sources=[{{path: {corpora}/one.jsonl}}]", f"--data.folder={corpora}/prepared"]
    own += [f"--reweight.strategy={strategy}", "--reweight.warmup_steps=50%"]
    contest(load_recipe("tiny", [*SMALL, *own]), 1)
    kinds = [False, True, True, False, False, True]  # plain first, weighted first, plain first
    assert seen == [(number // 2, kind) for number, kind in enumerate(kinds)]
    assert json.loads(capsys.readouterr().out)["rounds"] == 1
    assert not any(scratch.iterdir())
