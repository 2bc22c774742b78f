"""Generated tasks: answers hold against independent solvers; seeds and splits do what they say."""

from __future__ import annotations

import json
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from rondo.errors import UserError
from rondo.evals.tasks import KINDS, LABELLED, MQAR, Example, examples, labelled
from rondo.evals.tasks.__main__ import main
from rondo.pretrain.data import load_tokenizer

pytestmark = pytest.mark.quick


def draw(kind: str, size: int, split: str = "train", seed: int = 0, n: int = 300) -> list[Example]:
    return list(islice(examples(kind, size, split, seed=seed), n))


def matrices(points: int) -> list[np.ndarray]:
    """Permutation matrices in the order of their images."""
    images = sorted(np.ndindex(*[points] * points))
    return [np.eye(points, dtype=int)[list(p)] for p in images if len(set(p)) == points]


def rotations(size: int) -> list[np.ndarray]:
    """Permutation matrices of determinant 1."""
    return [m for m in matrices(size) if round(np.linalg.det(m)) == 1]


def solve(kind: str, prompt: str, size: int) -> str:
    if kind == "parity":
        return str(prompt.count("1") & 1)
    if kind == "modular_arithmetic":
        return str(eval(prompt.rstrip("=")) % 5)
    if kind == "cycle_navigation":
        return str((prompt.count("right") - prompt.count("left")) % 5)
    if kind == "s3_two_steps":
        words = prompt.split()[:-1]
        assert words[1::2] == [f"{word}'" for word in words[::2]]
        kind, prompt = "s3", f"{' '.join(words[::2])} ="
    if kind in ("s3", "s5", "a5", "s5_generators", "a5_generators"):
        points = int(kind[1])
        all_of_them = matrices(points) if kind[0] == "s" else rotations(points)
        product = np.eye(points, dtype=int)
        for index in prompt.split()[:-1]:
            product = product @ all_of_them[int(index)]
        return str(next(i for i, m in enumerate(all_of_them) if (m == product).all()))
    if kind == "delayed_match":
        bits = prompt.split()[:-1]
        return str(int(bits[-1] == bits[-1 - size]))
    if kind.startswith("mqar"):
        words = prompt.removesuffix(" =").split()
        return dict(zip(words[: 2 * size : 2], words[1 : 2 * size : 2], strict=True))[words[-1]]
    prompt = prompt.removesuffix(" =")
    if kind == "recall_twice":
        parts = prompt.split(" ? ")
        assert parts == parts[:2] * (len(parts) // 2)
        prompt = " ? ".join(parts[:2])
    pairs, key = prompt.split(" ? ")
    words = pairs.split()
    return dict(zip(words[::2], words[1::2], strict=True))[key]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 7])
def test_answers_are_right(kind: str, size: int) -> None:
    for prompt, answer in draw(kind, size, n=60):
        assert answer == f" {solve(kind, prompt, size)}"


def test_words_of_generators_reach_every_permutation() -> None:
    for kind, order in (("s5_generators", 120), ("a5_generators", 60)):
        walks = list(islice(labelled(kind, 40, "train"), 200))
        assert len({word for words, _ in walks for word in words}) == 2
        assert len({answer for _, answers in walks for answer in answers}) == order


@pytest.mark.parametrize("kind", KINDS)
def test_seeds_repeat_and_splits_share_nothing(kind: str) -> None:
    n = 30 if kind in MQAR else 300
    assert draw(kind, 8, n=n) == draw(kind, 8, n=n) != draw(kind, 8, seed=1, n=n)
    train = {e.prompt for seed in range(3) for e in draw(kind, 8, seed=seed, n=n)}
    assert not train & {e.prompt for e in draw(kind, 8, "test", n=n)}


@pytest.mark.parametrize("kind", LABELLED)
def test_answers_beside_words_are_those_of_shorter_texts(kind: str) -> None:
    for words, answers in islice(labelled(kind, 6, "train"), 20):
        assert len(words) == len(answers) and (kind in MQAR or answers[-1] is not None)
        for i, answer in enumerate(answers):
            if answer is not None:
                assert answer == solve(kind, f"{' '.join(words[: i + 1])} =", 6)


def test_pairs_that_are_read_twice_are_asked_for_twice() -> None:
    for words, answers in islice(labelled("recall_twice", 6, "train"), 20):
        once = words[: len(words) // 2]
        assert words == [*once, "?", *once] and once[12] == "?" and len(once) == 14
        assert answers == [*[None] * 13, answers[-1], None, *[None] * 13, answers[-1]]


def test_splits_of_texts_with_answers_beside_them() -> None:
    for kind in LABELLED:
        train, test = (
            {tuple(words) for words, _ in islice(labelled(kind, 8, split), 50)}
            for split in ("train", "test")
        )
        assert train and test and not train & test
    with pytest.raises(UserError, match="unknown task 'recall'"):
        next(labelled("recall", 3, "train"))


@pytest.mark.parametrize(("kind", "classes"), [("parity", 2), ("delayed_match", 2), ("s3", 6)])
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


def test_texts_to_train_on(tmp_path: Path) -> None:
    file = tmp_path / "s3.jsonl"
    words = ["s3", "--output", str(file), "--sizes", "6,9", "--examples", "5"]
    assert main(words) == 0
    texts = [json.loads(line)["text"] for line in file.read_text().splitlines()]
    streams = [examples("s3", size, "train") for size in (6, 9)]
    want = [next(streams[i % 2]) for i in range(5)]
    assert texts == [each.prompt + each.answer for each in want]
    with pytest.raises(UserError, match=r"sizes: .*'six'"):
        main([*words[:-4], "--sizes", "six"])


def test_marked_texts_and_their_words(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    file, words = tmp_path / "recall.jsonl", tmp_path / "words.json"
    options = ["--sizes", "3", "--examples", "40", "--marks=true", "--words", str(words)]
    assert main(["recall_small", "--output", str(file), *options]) == 0
    each = next(examples("recall_small", 3, "train"))
    first = json.loads(file.read_text().splitlines()[0])["text"]
    assert first == f"{each.prompt}<<{each.answer}>>"
    tokenizer = load_tokenizer(words)
    ids = tokenizer.encode(each.prompt)
    assert len(ids) == len(each.prompt.split()) and tokenizer.vocab_size <= 2 + 129
    assert tokenizer.decode(ids + tokenizer.encode(each.answer)) == each.prompt + each.answer
