"""RULER's single needles: each text is what the paper's template says, fills its length, and its
answer counts wherever it is generated."""

from __future__ import annotations

import re
import uuid
from pathlib import Path
from typing import Any

import pytest

from rondo.errors import UserError
from rondo.evals import ruler
from rondo.evals.needle import NOISE

TEXT = " ".join(f"Sentence {i} is of some words, and there are many." for i in range(400))
SHAPE = re.compile(
    r"A special magic (\w+) is hidden within the following text\. Make sure to memorize it\. "
    r"I will quiz you about the \1 afterwards\.\n(.*)\nWhat is the special magic \1 for "
    r"(\w+-\w+) mentioned in the provided text\? The special magic \1 for \3 mentioned in the "
    r"provided text is",
    re.DOTALL,
)


def draw(kind: str, length: int = 1500, count: int = 30, seed: int = 1) -> list[Any]:
    return list(ruler.samples(kind, length, count, seed=seed, text=lambda: TEXT))


@pytest.mark.quick
@pytest.mark.parametrize("kind", ruler.KINDS)
@pytest.mark.parametrize("length", [900, 4096])
def test_texts_have_the_shape_and_fill_their_length(kind: str, length: int) -> None:
    found = draw(kind, length)
    for sample in found:
        assert length - 128 - 120 < len(sample.prompt.encode()) <= length - 128
        name, hay, key = SHAPE.fullmatch(sample.prompt).groups()
        needle = f"One of the special magic {name}s for {key} is: {sample.answer}."
        assert hay.count(needle) == 1 == sample.prompt.count(sample.answer)
        if kind == "ruler_single_1":
            assert {*hay.split("\n")} == {NOISE.strip(), needle}
        else:
            before, after = hay.split(needle)
            joined = before.rstrip() + " " + after.lstrip()
            assert joined.strip() in TEXT + " " + TEXT
            size = len(hay) - len(needle)
            assert abs(len(before) / size - sample.depth) <= 60 / size  # a sentence
            assert round(sample.depth * 39, 6) % 1 == 0
        if kind == "ruler_single_3":
            assert name == "uuid" and uuid.UUID(sample.answer).version == 4
        else:
            assert name == "number" and re.fullmatch(r"[1-9]\d{6}", sample.answer)
    assert len({s.answer for s in found}) == len(found)
    assert min(s.depth for s in found) < 0.2 and max(s.depth for s in found) > 0.8


@pytest.mark.quick
def test_seeds_repeat_and_short_lengths_are_errors() -> None:
    assert draw("ruler_single_2") == draw("ruler_single_2") != draw("ruler_single_2", seed=2)
    with pytest.raises(UserError, match="ruler_single_3: 200 tokens leave no room"):
        draw("ruler_single_3", 200)


@pytest.mark.quick
def test_a_value_counts_wherever_it_is_generated() -> None:
    doc = {"answer": "ab-12"}
    assert ruler.found_value(doc, [" it is AB-12, of course"]) == {"acc": 1.0}
    assert ruler.found_value(doc, [" ab-1 2"]) == {"acc": 0.0}


def test_the_harness_scores_what_is_generated(tmp_path: Path) -> None:
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager

    from rondo.evals.catalog import Catalog, Sources
    from rondo.pretrain.data import load_tokenizer

    class Reader(LM):
        """Reads the value off the text, but for one sample."""

        def generate_until(self, requests: Any, **_: Any) -> list[str]:
            assert all(r.args[1]["max_gen_toks"] == 128 for r in requests)
            values = [re.search(r"is: (\S+)\.", r.args[0])[1] for r in requests]
            return [f" {value.upper()}. So" for value in values[:-1]] + [" nothing"]

        def loglikelihood(self, requests: Any, **_: Any) -> Any:
            raise AssertionError

        loglikelihood_rolling = loglikelihood

    (tmp_path / "text.txt").write_text(TEXT)
    sources = Sources(load_tokenizer("bytes"), text=str(tmp_path / "text.txt"), samples=5)
    task = Catalog(sources).find("ruler_single_3_1200")
    tasks = TaskManager(include_defaults=False).load([task])
    found = lm_eval.evaluate(Reader(), tasks, bootstrap_iters=0)
    assert found["results"]["ruler_single_3_1200"]["acc,none"] == 0.8
