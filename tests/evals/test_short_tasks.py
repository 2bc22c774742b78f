"""The table of small models: cells are made once, and show what was scored."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rondo.errors import UserError
from rondo.evals.short_tasks import main as short_tasks


def test_the_table_of_small_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tokenizers")
    words = ["--tasks", "parity", "--mixers", "attention", "--examples", "300", "--steps", "2"]
    words += ["--samples", "20", "--output", str(tmp_path)]
    assert short_tasks(words) == 0
    (run,) = tmp_path.glob("parity-attention-0")
    scores = json.loads((run / "accuracy.json").read_text())
    assert list(scores) == ["16", "64"] and all(0 <= s <= 1 for s in scores.values())
    printed = capsys.readouterr().out
    assert f"| attention | {scores['16']:.3f} | {scores['64']:.3f} |" in printed
    (run / "accuracy.json").write_text('{"16": 0.25, "64": 0.125}')  # kept, not made again
    assert short_tasks(words) == 0
    assert "| attention | 0.250 | 0.125 |" in (tmp_path / "table.md").read_text()
    with pytest.raises(UserError, match="tasks: unknown 'party'"):
        short_tasks(["--tasks", "party"])
