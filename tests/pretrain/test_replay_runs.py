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
    """3,600 texts of 60 letters of a bigram language whose logits are Gaussian, of scale 2."""
    count, table = 3600, np.exp(2 * draw.standard_normal((len(letters), len(letters))))
    ends = (table / table.sum(1, keepdims=True)).cumsum(1)[:, :-1]
    at = [draw.integers(len(letters), size=count)]
    for _ in range(59):
        at.append((ends[at[-1]] < draw.random((count, 1))).sum(1))
    texts = ("".join(letters[i] for i in text) for text in np.stack(at, 1))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


@pytest.mark.parametrize("steps", [80, pytest.param(240, marks=pytest.mark.slow)])
def test_a_little_replay_forgets_much_less_and_costs_little(steps: int, tmp_path: Path) -> None:
    """Two Gaussian bigram languages, half of whose letters are the same; no text is read twice but
    by replay. What it costs can be told from chance in the longer run only (docs/continual.md)."""
    letters, draw = string.ascii_letters, np.random.default_rng(0)
    write_language(letters[:26], tmp_path / "one.jsonl", draw)
    write_language(letters[13:39], tmp_path / "two.jsonl", draw)
    more = [
        *(f"--steps={steps}", "--optimizer.lr=1e-2", "--checkpoint.every=0"),
        "--schedule={name: cosine, warmup_steps: 5%}",
        *("--evals.every=0", "--evals.batches=32", "--logging.norms_every=0"),
    ]
    found = {}
    for share in ("0", "0.05"):
        stages = SHIFT.replace("REPLAY", f", replay: {{{{share: {share}}}}}")
        found[share] = run(tmp_path, tmp_path, f"--name=share{share}", *more, stages=stages)[-1]
    assert 0 < found["0.05"]["forgetting/one"] < 0.5 * found["0"]["forgetting/one"]
    bound = 1.01 if steps == 240 else 1.02
    assert found["0.05"]["adaptation/two"] < bound * found["0"]["adaptation/two"]
