"""Whole runs with replay: none of it is none, and a little goes far."""

from __future__ import annotations

import json
import string
from pathlib import Path

import numpy as np
import pytest

from rondo.models.loading import find_checkpoint, read_tensors
from rondo.tests.pretrain.test_stages import corpora as corpora
from rondo.tests.pretrain.test_stages import equal, run

SHIFT = """[
  {{name: one, data: {{sources: [{{path: {0}/one.jsonl}}]}}}},
  {{name: two, data: {{sources: [{{path: {0}/two.jsonl}}]}}REPLAY}}]"""


@pytest.mark.parametrize("replay", ["{{share: 0}}", "{{share: [0, 0], source: [one, BASE]}}"])
def test_a_share_of_0_is_no_replay_to_the_last_bit(
    replay: str, corpora: Path, tmp_path: Path
) -> None:
    """Neither does following another run's text, of which nothing is replayed, change anything."""
    found, quick = [], ["--evals.every=0", "--logging.norms_every=0"]
    run(corpora, tmp_path, *quick, "--name=base", "--steps=2", stages="[]")
    for name, words in (("none", ""), ("zero", f", replay: {replay}")):
        words = words.replace("BASE", str(tmp_path / "runs/base"))
        stages = SHIFT.replace("REPLAY", words)
        run(corpora, tmp_path, *quick, f"--name={name}", stages=stages)
        end = find_checkpoint(tmp_path / "runs" / name)
        found.append({**read_tensors(end / "model"), **read_tensors(end / "optimizer")})
    assert len(found[0]) > 10 and equal(*found)


def write_language(letters: str, path: Path, draw: np.random.Generator) -> None:
    """A bigram language whose logits are Gaussian, of scale 2."""
    table = np.exp(2 * draw.standard_normal((len(letters), len(letters))))
    table /= table.sum(1, keepdims=True)
    with path.open("w") as file:
        for _ in range(300):
            letter, text = draw.integers(len(letters)), ""
            for _ in range(60):
                letter = draw.choice(len(letters), p=table[letter])
                text += letters[letter]
            file.write(json.dumps({"text": text}) + "\n")


def test_a_little_replay_forgets_much_less_and_costs_under_a_hundredth(tmp_path: Path) -> None:
    """Two Gaussian bigram languages, half of whose letters are the same. If all are the same, 5%
    costs 1 to 2% here: which of two languages a text is in has to be told from its first letters.
    """
    letters, draw = string.ascii_letters, np.random.default_rng(0)
    write_language(letters[:26], tmp_path / "one.jsonl", draw)
    write_language(letters[13:39], tmp_path / "two.jsonl", draw)
    more = [
        *("--steps=80", "--optimizer.lr=1e-2", "--checkpoint.every=0"),
        *("--evals.every=0", "--evals.batches=8", "--logging.norms_every=0"),
    ]
    found = {}
    for share in ("0", "0.05"):
        stages = SHIFT.replace("REPLAY", f", replay: {{{{share: {share}}}}}")
        found[share] = run(tmp_path, tmp_path, f"--name=share{share}", *more, stages=stages)[-1]
    assert 0 < found["0.05"]["forgetting/one"] < 0.3 * found["0"]["forgetting/one"]
    assert found["0.05"]["adaptation/two"] < 1.01 * found["0"]["adaptation/two"]
