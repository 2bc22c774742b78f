"""What the specifications of nonlinear cells promise of tracking a state, as small trainings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rondo.evals.short_tasks import main as short_tasks

pytestmark = pytest.mark.slow


def accuracy(folder: Path, task: str, mixer: str) -> dict[str, float]:
    """Of one seed, by size of text."""
    words = ["--tasks", task, "--mixers", mixer, "--seeds", "1", "--output", str(folder)]
    assert short_tasks(words) == 0
    return json.loads((folder / f"{task}-{mixer}-0.json").read_text())["accuracy"]


def test_slstm_has_parity_far_beyond_the_texts_of_training(tmp_path: Path) -> None:
    """Trained on 3 to 40 bits; a layer with eigenvalues from 0 to 1 is at a guess in length."""
    found = accuracy(tmp_path, "parity_40", "slstm")
    assert list(found) == ["40", "128", "256"] and min(found.values()) >= 0.99, found
    assert accuracy(tmp_path, "parity_40", "mamba2")["256"] < 0.6
