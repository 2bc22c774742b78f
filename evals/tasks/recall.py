"""Recall: the value of a key, asked for many times (MQAR, arXiv 2312.04927) or once."""

from __future__ import annotations

import random

from rondo.errors import UserError
from rondo.evals.tasks.state_tracking import Walk

MQAR_LENGTHS = (64, 128, 256, 512, 1024)
"""Of the settings of Zoology's figure 2 and of BASED (arXiv 2402.18668)."""


def mqar(
    draw: random.Random,
    size: int,
    *,
    length: int,
    words: int = 8192,
    power: float = 0.01,
    fill: bool = True,
    slot: int = 2,
) -> Walk:
    """Multi-query associative recall as Zoology generates it (arXiv 2312.04927).

    `size` pairs come first, `k1 v1 k2 v2...`; the rest of the text are slots. Each key is written
    once more at the beginning of a slot, and the answer there, which is not in the text after it,
    is its value. Slots are drawn without replacement, in the order of the keys, slot i = 1, 2...
    with a probability proportional to `power i^(power - 1)`: near 0 most questions come soon, at 1
    they are anywhere.

    Args:
        size: pairs n, at most `length / (2 + slot)`.
        length: words of a text.
        words: vocabulary V; keys are distinct ids in [1, V/2), values distinct ones in [V/2, V).
        power: exponent a of the law of gaps.
        fill: other places hold any words (which may be keys; nothing is asked there), else 0.
        slot: words of a slot.

    Raises:
        UserError: there is no room for so many pairs, or there are not so many keys.
    """
    if (most := min(length // (2 + slot), words // 2 - 1)) < size:
        raise UserError(f"size: {length} of {words} words have room for {most} pairs, got {size}")
    keys, values = (
        draw.sample(range(1, words // 2), size),
        draw.sample(range(words // 2, words), size),
    )
    pairs = [x for pair in zip(keys, values, strict=True) for x in pair]
    rest = length - 2 * size
    text = [*pairs, *(draw.choices(range(words), k=rest) if fill else [0] * rest)]
    answers: list[str | None] = [None] * length
    # Of exponential clocks, one a slot, the order is that of draws without replacement.
    clocks = [draw.expovariate(i ** (power - 1)) for i in range(1, rest // slot + 1)]
    order = sorted(range(len(clocks)), key=clocks.__getitem__)
    for key, value, place in zip(keys, values, order[:size], strict=True):
        text[2 * size + slot * place] = key
        answers[2 * size + slot * place] = str(value)
    return [str(word) for word in text], answers


def mqar_all(draw: random.Random, size: int) -> Walk:
    """`mqar` without gaps or filler: 63 keys and 64 values, slots of one word, as many as pairs."""
    return mqar(draw, size, length=3 * size, words=128, power=1.0, slot=1)


def recall(
    draw: random.Random, size: int, numbers: tuple[int, int, int] = (1000, 5000, 9000)
) -> tuple[str, str]:
    """`size` pairs of distinct keys and distinct values; one key is asked for, at the end.

    Keys go from the first of `numbers` to before the second, values from there to before the last.
    """
    first, middle, last = numbers
    if size > min(middle - first, last - middle):
        raise UserError(f"size: there are {middle - first} keys, got {size} pairs")
    keys = draw.sample(range(first, middle), size)
    values = draw.sample(range(middle, last), size)
    asked = draw.randrange(size)
    pairs = " ".join(f"{k} {v}" for k, v in zip(keys, values, strict=True))
    return f"{pairs} ? {keys[asked]}", str(values[asked])


def recall_small(draw: random.Random, size: int) -> tuple[str, str]:
    """`recall` with 64 keys and 64 values: a vocabulary for small models."""
    return recall(draw, size, (0, 64, 128))


def recall_words(draw: random.Random, size: int, *, twice: bool = False) -> Walk:
    """`recall_small` with its answer beside the last word; `twice`: as `recall_twice` reads it,
    with the answer beside both questions."""
    prompt, answer = recall_small(draw, size)
    words = prompt.split()
    asked: list[str | None] = [*[None] * (len(words) - 1), answer]
    return ([*words, "?", *words], [*asked, None, *asked]) if twice else (words, asked)


def recall_twice(draw: random.Random, size: int) -> tuple[str, str]:
    """`recall` with pairs and question read twice (JRT prompt, arXiv 2407.05483): at the second
    reading a recurrent model knows what to keep."""
    prompt, answer = recall(draw, size)
    return f"{prompt} ? {prompt}", answer
