"""Static domain weights, as DoReMi and DoGE found them: what is published is what is drawn by."""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from pathlib import Path

import pytest

from rondo.pretrain import load_recipe
from rondo.pretrain.data import Curriculum, PrepareConfig, Sources, load_tokenizer, prepare
from rondo.pretrain.parse import bundled_recipes
from rondo.pretrain.recipe import SourceConfig

pytestmark = pytest.mark.quick
DOMAINS = ["arxiv", "book", "cc", "c4", "github", "stackexchange", "wikipedia"]
README = Path(__file__).parents[2] / "pretrain" / "README.md"


def published(method: str) -> list[float]:
    """The row of a method in the README's table, whose heads are the domains."""
    lines = README.read_text().splitlines()
    [row] = [line for line in lines if line.startswith(f"| {method} (arXiv ")]
    assert f"| | {' | '.join(DOMAINS)} |" in lines
    return [float(cell) for cell in row.strip("| ").split(" | ")[1:]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A little text, prepared."""
    root = tmp_path_factory.mktemp("domains")
    lines = (json.dumps({"text": f"document {i}" * 4}) + "\n" for i in range(60))
    (root / "text.jsonl").write_text("".join(lines))
    config = PrepareConfig(str(root / "text.jsonl"), str(root / "prepared"), workers=0)
    return prepare(config, quiet=True)


def test_the_recipe_has_the_published_weights() -> None:
    sources = load_recipe("slimpajama-124m").data.sources
    assert [Path(source.path).name for source in sources] == DOMAINS
    assert [source.weight for source in sources] == published("DoReMi")
    told = re.search(r"order below: ([^:]*)\. To hold", _comment())
    assert told and [float(word) for word in told[1].split(",")] == published("DoGE")


def _comment() -> str:
    lines = bundled_recipes()["slimpajama-124m"].splitlines()
    return " ".join(line.strip("# ") for line in lines if line.startswith("#"))


@pytest.mark.parametrize("method", ["DoReMi", "DoGE"])
def test_they_sum_to_1_and_samples_follow_them(method: str, folder: Path) -> None:
    """Of the first n samples of the recipe each domain has its share, at every n."""
    weights = published(method)
    assert sum(weights) == pytest.approx(1, abs=1e-4)
    sources = [SourceConfig(name, weight) for name, weight in zip(DOMAINS, weights, strict=True)]
    recipe = load_recipe("slimpajama-124m", ["--data.sequence_length=32"])
    recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, sources=sources))
    prepared = Sources([folder] * len(DOMAINS), weights, load_tokenizer("bytes"))
    training = Curriculum(recipe, prepared)
    counts: Counter[int] = Counter()
    for n in range(1, 1601):
        counts[training.source(n - 1)] += 1
        shares = [n * weight / sum(weights) for weight in weights]
        assert all(abs(counts[i] - share) < 1.69 for i, share in enumerate(shares))
    accounts = training.repeats(DOMAINS)
    assert [account.share for account in accounts] == pytest.approx(weights, abs=1e-4)
