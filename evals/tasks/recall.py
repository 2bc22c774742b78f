"""Recall: which value went with a key (MQAR, arXiv 2312.04927, one query a text); paths."""

from __future__ import annotations

import itertools
import random

from rondo.errors import UserError
from rondo.evals.tasks.state_tracking import Walk


def mqar(
    draw: random.Random, size: int, numbers: tuple[int, int, int] = (1000, 5000, 9000)
) -> tuple[str, str]:
    """`size` pairs of distinct keys and distinct values; one key is asked for.

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


def mqar_small(draw: random.Random, size: int) -> tuple[str, str]:
    """`mqar` with 64 keys and 64 values: a vocabulary for small models."""
    return mqar(draw, size, (0, 64, 128))


def mqar_all(draw: random.Random, size: int) -> Walk:
    """`size` pairs of 64 keys and 64 values, then each of the keys once, in any order: its value is
    the answer beside it, as in the paper, and is not in the text."""
    if size > 64:
        raise UserError(f"size: there are 64 keys, got {size} pairs")
    keys, values = draw.sample(range(64), size), draw.sample(range(64, 128), size)
    pairs = [str(x) for pair in zip(keys, values, strict=True) for x in pair]
    asked = draw.sample(range(size), size)
    answers = [str(values[i]) for i in asked]
    return [*pairs, *(str(keys[i]) for i in asked)], [None] * len(pairs) + answers


def mqar_twice(draw: random.Random, size: int) -> tuple[str, str]:
    """`mqar` with pairs and question read twice (JRT prompt, arXiv 2407.05483): at the second
    reading a recurrent model knows what to keep."""
    prompt, answer = mqar(draw, size)
    return f"{prompt} ? {prompt}", answer


def path_finding(draw: random.Random, size: int) -> tuple[str, str]:
    """A directed line of `size` edges between letters, shuffled among as many edges of a second
    line; the end of the line that begins at a given letter is asked for."""
    if size > 12:
        raise UserError(f"size: path_finding has room for 12 edges, got {size}")
    names = draw.sample("abcdefghijklmnopqrstuvwxyz", 2 * (size + 1))
    lines = [names[: size + 1], names[size + 1 :]]
    edges = [f"{a}{b}" for line in lines for a, b in itertools.pairwise(line)]
    draw.shuffle(edges)
    return f"{' '.join(edges)} ? {lines[0][0]}", lines[0][-1]
