"""MQAR as Zoology generates it: pairs, then keys at gaps that follow a power law; who answers."""

from __future__ import annotations

import random
from collections import Counter
from itertools import islice
from typing import Any

import numpy as np
import pytest

from rondo.errors import UserError
from rondo.evals.tasks import SPLITS, examples, labelled
from rondo.evals.tasks.recall import mqar

# Of the settings of Zoology and BASED, the shortest and the longest.
SETTINGS = [(64, 4), (64, 16), (128, 8), (256, 64), (512, 64), (1024, 256)]


@pytest.mark.quick
@pytest.mark.parametrize(("length", "pairs"), SETTINGS)
@pytest.mark.parametrize("fill", [True, False])
def test_texts_have_the_shape_of_the_paper(length: int, pairs: int, fill: bool) -> None:
    kind = f"mqar_{length}" if fill else f"mqar_zeros_{length}"
    for words, answers in islice(labelled(kind, pairs, "train"), 5):
        ids, first = [int(word) for word in words], 2 * pairs
        keys, values = ids[:first:2], ids[1:first:2]
        assert len(ids) == len(answers) == length
        assert len({*keys}) == len({*values}) == pairs
        assert all(1 <= key < 4096 for key in keys) and all(4096 <= v < 8192 for v in values)
        asked = [i for i, answer in enumerate(answers) if answer is not None]
        assert sorted(ids[i] for i in asked) == sorted(keys)  # each key once
        assert all(i >= first and i % 2 == 0 for i in asked)
        assert all(answers[i] == str(values[keys.index(ids[i])]) for i in asked)
        between = [ids[i] for i in range(first, length) if i not in asked]
        assert all(0 <= word < 8192 for word in between)
        assert (len({*between}) > 0.8 * len(between)) if fill else {*between} == {0}


def chi_square(counts: Counter[int], shares: np.ndarray) -> float:
    """Per degree of freedom, of bins that expect 20 at least."""
    n, statistic, bins, seen, share = sum(counts.values()), 0.0, 0, 0, 0.0
    for i, p in enumerate(shares):
        seen, share = seen + counts[i], share + p
        if n * share >= 20 or i == len(shares) - 1:
            statistic += (seen - n * share) ** 2 / (n * share)
            bins, seen, share = bins + 1, 0, 0.0
    return statistic / (bins - 1)


@pytest.mark.quick
@pytest.mark.parametrize("power", [0.01, 0.5, 1.0])
def test_gaps_follow_the_power_law(power: float) -> None:
    length, pairs, n, draw = 64, 4, 3000, random.Random(0)
    slots: list[list[int]] = []
    for _ in range(n):
        words, answers = mqar(draw, pairs, length=length, power=power, fill=False)
        at = {words[i]: (i - 2 * pairs) // 2 for i, a in enumerate(answers) if a is not None}
        slots.append([at[key] for key in words[: 2 * pairs : 2]])
    p = np.arange(1, (length - 2 * pairs) // 2 + 1) ** (power - 1)
    p /= p.sum()
    # The first key has its slot by the law, the second by the law without the first's.
    second = np.array(
        [sum(p[k] * p[i] / (1 - p[k]) for k in range(len(p)) if k != i) for i in range(len(p))]
    )
    for key, shares in enumerate((p, second)):
        # 27 degrees of freedom: beyond 2.06 once in a thousand.
        assert chi_square(Counter(row[key] for row in slots), shares) < 2.06
    other = np.arange(1, len(p) + 1) ** (power - 1.3)
    assert chi_square(Counter(row[0] for row in slots), other / other.sum()) > 4


@pytest.mark.quick
@pytest.mark.parametrize("kind", ["mqar_64", "mqar_small_64", "mqar_zeros_64", "mqar_all"])
def test_no_pairs_are_in_both_splits(kind: str) -> None:
    pairs: dict[str, set[str]] = {}
    for split in SPLITS:
        texts = [words for words, _ in islice(labelled(kind, 1, split), 300)]
        asked = [each.prompt.split() for each in islice(examples(kind, 1, split), 300)]
        pairs[split] = {" ".join(words[:2]) for words in [*texts, *asked]}
    assert len(pairs["test"]) > 200 and not pairs["train"] & pairs["test"]


@pytest.mark.quick
def test_each_question_is_asked_as_often() -> None:
    found = list(islice(examples("mqar_64", 4, "test"), 2000))
    keys = Counter(each.prompt.split()[:8:2].index(each.prompt.split()[-1]) for each in found)
    assert chi_square(keys, np.full(4, 0.25)) < 5.4  # 3 degrees of freedom, one in a thousand


@pytest.mark.quick
def test_what_has_no_room_is_an_error() -> None:
    with pytest.raises(UserError, match="size: 64 of 8192 words have room for 16 pairs, got 17"):
        next(labelled("mqar_64", 17, "train"))
    with pytest.raises(UserError, match="size: 192 of 128 words have room for 63 pairs, got 64"):
        next(labelled("mqar_all", 64, "train"))


def test_the_harness_asks_for_values() -> None:
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager

    from rondo.evals.catalog import Catalog, Sources
    from rondo.pretrain.data import load_tokenizer

    class Reader(LM):
        """Knows the values of keys that come first or second."""

        def loglikelihood(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
            return [(-1.0, self.right(*request.args)) for request in requests]

        @staticmethod
        def right(prompt: str, answer: str) -> bool:
            words = prompt.split()
            return words.index(words[-1]) < 4 and answer == f" {words[words.index(words[-1]) + 1]}"

        def generate_until(self, requests: Any, **_: Any) -> Any:
            raise AssertionError

        loglikelihood_rolling = generate_until

    catalog = Catalog(Sources(load_tokenizer("bytes"), samples=40))
    names = [f"mqar_{length}_{pairs}" for length, pairs in SETTINGS[:3]]
    tasks = TaskManager(include_defaults=False).load([catalog.find(name) for name in names])
    found = lm_eval.evaluate(Reader(), tasks, bootstrap_iters=0)["results"]
    shares = [found[name]["acc,none"] for name in names]
    assert 0.25 < shares[0] < 0.75 and shares[1] < 0.4 and shares[2] < 0.5
