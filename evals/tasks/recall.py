"""Associative recall: which value went with a key (MQAR, arXiv 2312.04927, one query a text)."""

from __future__ import annotations

import random


def mqar(draw: random.Random, size: int) -> tuple[str, str]:
    """`size` pairs of distinct keys and distinct values; one key is asked for.

    Keys and values have four digits, keys below 5000 and values from 5000 on.
    """
    keys = draw.sample(range(1000, 5000), size)
    values = draw.sample(range(5000, 9000), size)
    asked = draw.randrange(size)
    pairs = " ".join(f"{k} {v}" for k, v in zip(keys, values, strict=True))
    return f"{pairs} ? {keys[asked]}", str(values[asked])
