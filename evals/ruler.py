"""The single needles of RULER (arXiv 2404.06654) in its own words, for texts of any length.

As there: the instruction, the needle, the question, the beginning of the answer, what keys and
values are, lines of noise or sentences of prose around it, 40 depths between sentences, a budget
of tokens that covers the 128 to be generated, greedy decoding, and a value that counts wherever it
stands in what was generated, in capitals or not. Not as there: the prose (any text instead of
Graham's essays), where its sentences end (at a stop before a space), the words that keys are made
of, and the number of sentences, which is chosen for each sample so that it fills its budget.
"""

from __future__ import annotations

import random
import re
import uuid
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

from rondo.errors import UserError
from rondo.evals.needle import NOISE, Sample, split_of

NEW_TOKENS = 128
"""Generated for an answer, and part of a text's length."""
DEPTHS = 40
"""Places of the needle in prose, evenly spaced from the beginning to the end."""
_ABOUT = (
    "A special magic {kind} is hidden within the following text. Make sure to memorize it. I will "
    "quiz you about the {kind} afterwards.\n"
)
_NEEDLE = "One of the special magic {kind}s for {key} is: {value}."
_QUESTION = "\nWhat is the special magic {kind} for {key} mentioned in the provided text?"
_ANSWER = " The special magic {kind} for {key} mentioned in the provided text is"
_FIRST = (
    "amber brave calm dusty eager faint gentle hollow icy jolly keen loud mellow noble odd proud"
)
_SECOND = (
    "anchor basket candle dragon engine forest garden hammer island jacket kettle ladder mirror"
)


class Kind(NamedTuple):
    """What is around the needle, and what it tells."""

    prose: bool
    """Real text, else lines of noise."""
    value: str
    """number (seven digits) or uuid."""


KINDS = {
    "ruler_single_1": Kind(False, "number"),
    "ruler_single_2": Kind(True, "number"),
    "ruler_single_3": Kind(True, "uuid"),
}


def samples(
    kind: str,
    length: int,
    count: int,
    *,
    seed: int,
    text: Callable[[], str],
    tokens: Callable[[str], int] = lambda text: len(text.encode()),
    split: str = "test",
) -> Iterator[Sample]:
    """`count` samples, as long as whole sentences allow for prompt and 128 new tokens to have
    `length` tokens; see `needle.samples`. A sample's answer is its value, which has no space
    before it.

    Raises:
        UserError: the length leaves no room.
    """
    what = KINDS[kind]
    draw = random.Random(f"{kind} {length} {seed}")
    prose = re.split(r"(?<=[.!?]) +", text()) if what.prose else []
    for _ in range(count):
        key = f"{draw.choice(_FIRST.split())}-{draw.choice(_SECOND.split())}"
        value = next(v for v in _values(what.value, draw) if split_of(v) == split)
        start = draw.randrange(len(prose)) if prose else 0
        place = draw.randrange(DEPTHS) / (DEPTHS - 1) if prose else draw.random()
        names = {"kind": what.value, "key": key, "value": value}
        build = partial(_prompt, prose, start, place, names)
        if tokens(build(0)) > length - NEW_TOKENS:
            raise UserError(
                f"{kind}: {length} tokens leave no room beside the question and {NEW_TOKENS} to "
                "be generated"
            )
        most = _most(build, tokens, length - NEW_TOKENS)
        yield Sample(build(most), value, place)


def _prompt(
    prose: Sequence[str], start: int, place: float, names: dict[str, str], sentences: int
) -> str:
    """The text with so many sentences around the needle: from `start` on, or lines of noise."""
    hay: list[str]
    if prose:
        hay = [prose[(start + i) % len(prose)] for i in range(sentences)]
    else:
        hay = [NOISE.strip()] * sentences
    hay.insert(int(place * len(hay)), _NEEDLE.format(**names))
    middle = (" " if prose else "\n").join(hay)
    about, question, answer = (part.format(**names) for part in (_ABOUT, _QUESTION, _ANSWER))
    return f"{about}{middle}{question}{answer}"


def _values(kind: str, draw: random.Random) -> Iterator[str]:
    while True:
        if kind == "uuid":
            yield str(uuid.UUID(int=draw.getrandbits(128), version=4))
        else:
            yield str(draw.randint(10**6, 10**7 - 1))


def _most(build: Callable[[int], str], tokens: Callable[[str], int], room: int) -> int:
    """The largest number of sentences that fits; 0 does."""
    low, high = 0, 1
    while tokens(build(high)) <= room:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if tokens(build(middle)) <= room else (low, middle)
    return low


def found_value(doc: dict[str, str], results: Sequence[str]) -> dict[str, float]:
    """The harness's metric: whether the value is in what was generated."""
    return {"acc": float(doc["answer"].lower() in results[0].lower())}
