"""Texts with answers, generated from a seed: what recurrent models can and cannot keep.

`KINDS[kind](draw, size)` gives one prompt and its answer. `examples` draws from them, and gives
each prompt to one split only, by its hash; paths on a graph have splits of their own (`paths`).
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import NamedTuple, TypeVar

from rondo.errors import UserError
from rondo.evals.tasks import paths
from rondo.evals.tasks.recall import (
    MQAR_LENGTHS,
    mqar,
    mqar_all,
    recall,
    recall_small,
    recall_twice,
    recall_words,
)
from rondo.evals.tasks.state_tracking import (
    Walk,
    cycle_navigation,
    delayed_match,
    group_word,
    modular_arithmetic,
    parity,
    two_steps,
)

T = TypeVar("T")
_PATIENCE = 10_000
"""Draws in a row of the other split after which this one counts as empty."""
SPLITS = ("train", "test")
_STATES: dict[str, Callable[[random.Random, int], Walk]] = {
    "parity": parity,
    "cycle_navigation": cycle_navigation,
    "modular_arithmetic": modular_arithmetic,
    "s3": lambda draw, size: group_word(draw, size, 3),
    "s5": lambda draw, size: group_word(draw, size, 5),
    "a5": lambda draw, size: group_word(draw, size, 5, even=True),
    "s5_generators": lambda draw, size: group_word(draw, size, 5, generators=True),
    "a5_generators": lambda draw, size: group_word(draw, size, 5, even=True, generators=True),
}
MQAR: dict[str, Callable[[random.Random, int], Walk]] = {
    **{f"mqar_{length}": partial(mqar, length=length) for length in MQAR_LENGTHS},
    # As in figure 2 of Zoology: nothing between the questions.
    **{f"mqar_zeros_{length}": partial(mqar, length=length, fill=False) for length in MQAR_LENGTHS},
    **{f"mqar_small_{length}": partial(mqar, length=length, words=512) for length in MQAR_LENGTHS},
    "mqar_all": mqar_all,
}
"""By length; sizes are pairs: `mqar_64` of 4."""
LABELLED: dict[str, Callable[[random.Random, int], Walk]] = {
    **_STATES,
    **MQAR,
    "s3_two_steps": lambda draw, size: two_steps(group_word(draw, size, 3)),
    "recall_once": recall_words,
    "recall_twice": partial(recall_words, twice=True),
}
"""Tasks with an answer beside their words."""


def _text(walk: Callable[[random.Random, int], Walk]) -> Callable[..., tuple[str, str]]:
    """A task that asks for the last answer only."""

    def ask(draw: random.Random, size: int) -> tuple[str, str]:
        words, answers = walk(draw, size)
        return f"{' '.join(words)} =", str(answers[-1])

    return ask


def _question(walk: Callable[[random.Random, int], Walk]) -> Callable[..., tuple[str, str]]:
    """A task that asks for one of the answers, each as often: the text up to there. The mean over
    texts is then that over all answers, of which each text has as many."""

    def ask(draw: random.Random, size: int) -> tuple[str, str]:
        words, answers = walk(draw, size)
        asked = draw.choice([i for i, answer in enumerate(answers) if answer is not None])
        return " ".join(words[: asked + 1]), str(answers[asked])

    return ask


KINDS: dict[str, Callable[[random.Random, int], tuple[str, str]]] = {
    **{name: _text(walk) for name, walk in _STATES.items()},
    **{name: _question(walk) for name, walk in MQAR.items()},
    "delayed_match": delayed_match,
    "recall": recall,
    "recall_small": recall_small,
    "recall_twice": recall_twice,
}
PLANNING = "path_finding"
"""The one task of which a split is drawn as a whole; sizes are nodes of its graph."""
NAMES = (*KINDS, PLANNING)
"""What `examples` knows."""


class Example(NamedTuple):
    """A text that ends with a question, and its answer (with the space before it)."""

    prompt: str
    answer: str


def examples(kind: str, size: int, split: str, *, seed: int = 0) -> Iterator[Example]:
    """Endless examples. A prompt of the test split, one in four, is never in the other.

    Args:
        kind: one of `NAMES`.
        size: bits, numbers, permutations, pairs or nodes; for `delayed_match` the delay.
        split: "train" or "test".

    Raises:
        UserError: kind or split is unknown, or the size is below 1, or too small for two splits.
    """
    _check(NAMES, kind, size, split)
    if kind == PLANNING:
        found = paths.lines(size, split, seed)
    else:
        draws = _draws(KINDS[kind], kind, size, split, seed)
        found = _of_split(draws, kind, size, split, lambda each: each[0].split())
    for prompt, answer in found:
        yield Example(prompt, f" {answer}")


def labelled(kind: str, size: int, split: str, *, seed: int = 0) -> Iterator[Walk]:
    """As `examples`, with an answer beside every word that has one; `kind` is a key of `LABELLED`.

    A text belongs to a split by all of its words, of MQAR by its pairs: beginnings of other texts
    may be in the other split.
    """
    _check(LABELLED, kind, size, split)
    draws = _draws(LABELLED[kind], kind, size, split, seed)
    yield from _of_split(draws, kind, size, split, lambda walk: [*walk[0], "="])


def _check(kinds: Iterable[str], kind: str, size: int, split: str) -> None:
    if kind not in kinds:
        raise UserError(f"kind: unknown task {kind!r} (known: {', '.join(kinds)})")
    if split not in SPLITS:
        raise UserError(f"split: expected train or test, got {split!r}")
    if size < 1:
        raise UserError(f"size: must be at least 1, got {size}")


def _draws(
    one: Callable[[random.Random, int], T], kind: str, size: int, split: str, seed: int
) -> Iterator[T]:
    draw = random.Random(f"{kind} {size} {split} {seed}")
    while True:
        yield one(draw, size)


def _of_split(
    draws: Iterator[T], kind: str, size: int, split: str, words: Callable[[T], list[str]]
) -> Iterator[T]:
    """The draws whose words are of the split, by their hash; of MQAR the pairs alone decide, so
    that no question about them is in the other split."""
    rejected = 0
    for each in draws:
        rejected += 1
        told = words(each)[: 2 * size if kind in MQAR else None]
        if (zlib.crc32(" ".join(told).encode()) % 4 == 0) == (split == "test"):
            rejected = 0
            yield each
        elif rejected == _PATIENCE:
            raise UserError(f"size: {kind} of {size} has too few prompts for a {split} split")
