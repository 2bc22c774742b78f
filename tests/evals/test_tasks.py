"""Generated tasks: answers hold against independent solvers; seeds and splits do what they say."""

from __future__ import annotations

from collections import Counter
from itertools import islice

import numpy as np
import pytest

from rondo.errors import UserError
from rondo.evals.tasks import KINDS, Example, examples

pytestmark = pytest.mark.quick


def draw(kind: str, size: int, split: str = "train", seed: int = 0, n: int = 300) -> list[Example]:
    return list(islice(examples(kind, size, split, seed=seed), n))


def matrices(points: int) -> list[np.ndarray]:
    """Permutation matrices in the order of their images."""
    images = sorted(np.ndindex(*[points] * points))
    return [np.eye(points, dtype=int)[list(p)] for p in images if len(set(p)) == points]


def solve(kind: str, prompt: str) -> str:
    if kind == "parity":
        return str(prompt.count("1") & 1)
    if kind == "modular_arithmetic":
        return str(eval(prompt.rstrip("=")) % 5)
    if kind in ("s3", "s5"):
        all_of_them, product = matrices(int(kind[1])), np.eye(int(kind[1]), dtype=int)
        for index in prompt.split()[:-1]:
            product = product @ all_of_them[int(index)]
        return str(next(i for i, m in enumerate(all_of_them) if (m == product).all()))
    pairs, key = prompt.split(" ? ")
    words = pairs.split()
    return dict(zip(words[::2], words[1::2], strict=True))[key]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 7])
def test_answers_are_right(kind: str, size: int) -> None:
    for prompt, answer in draw(kind, size, n=60):
        assert answer == f" {solve(kind, prompt)}"


@pytest.mark.parametrize("kind", KINDS)
def test_seeds_repeat_and_splits_share_nothing(kind: str) -> None:
    assert draw(kind, 8) == draw(kind, 8) != draw(kind, 8, seed=1)
    train = {e.prompt for seed in range(3) for e in draw(kind, 8, seed=seed)}
    assert not train & {e.prompt for e in draw(kind, 8, "test")}


@pytest.mark.parametrize(("kind", "classes"), [("parity", 2), ("s3", 6)])
def test_classes_are_uniform(kind: str, classes: int) -> None:
    counts = Counter(e.answer for e in draw(kind, 12, n=3000))
    assert len(counts) == classes
    expected = 3000 / classes
    assert sum((n - expected) ** 2 / expected for n in counts.values()) < 20.5  # p = .001 for s3


def test_bad_arguments_are_named() -> None:
    for words, message in (
        (("party", 3, "train"), "party"),
        (("parity", 0, "train"), "size"),
        (("parity", 3, "dev"), "dev"),
        (("parity", 3, "test"), "parity of 3 has too few prompts for a test split"),
    ):
        with pytest.raises(UserError, match=message):
            next(examples(*words))
