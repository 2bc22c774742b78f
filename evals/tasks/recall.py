"""Recall: which value went with a key (MQAR, arXiv 2312.04927, one query a text); paths."""

from __future__ import annotations

import itertools
import random

from rondo.errors import UserError


def mqar(draw: random.Random, size: int) -> tuple[str, str]:
    """`size` pairs of distinct keys and distinct values; one key is asked for.

    Keys and values have four digits, keys below 5000 and values from 5000 on.
    """
    keys = draw.sample(range(1000, 5000), size)
    values = draw.sample(range(5000, 9000), size)
    asked = draw.randrange(size)
    pairs = " ".join(f"{k} {v}" for k, v in zip(keys, values, strict=True))
    return f"{pairs} ? {keys[asked]}", str(values[asked])


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
