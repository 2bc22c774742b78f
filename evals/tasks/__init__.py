"""Texts with answers, generated from a seed: what recurrent models can and cannot keep.

`KINDS[kind](draw, size)` gives one prompt and its answer. `examples` draws from them, and gives
each prompt to one split only, by its hash.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

from rondo.errors import UserError
from rondo.evals.tasks.recall import mqar, mqar_small, mqar_twice, path_finding
from rondo.evals.tasks.state_tracking import delayed_match, group_word, modular_arithmetic, parity

_PATIENCE = 10_000
"""Draws in a row of the other split after which this one counts as empty."""
SPLITS = ("train", "test")
KINDS: dict[str, Callable[[random.Random, int], tuple[str, str]]] = {
    "parity": parity,
    "modular_arithmetic": modular_arithmetic,
    "s3": lambda draw, size: group_word(draw, size, 3),
    "s5": lambda draw, size: group_word(draw, size, 5),
    "delayed_match": delayed_match,
    "mqar": mqar,
    "mqar_small": mqar_small,
    "mqar_twice": mqar_twice,
    "path_finding": path_finding,
}


class Example(NamedTuple):
    """A text that ends with a question, and its answer (with the space before it)."""

    prompt: str
    answer: str


def examples(kind: str, size: int, split: str, *, seed: int = 0) -> Iterator[Example]:
    """Endless examples; one in four prompts is of the test split, and never in the other.

    Args:
        kind: a key of `KINDS`.
        size: bits, numbers, permutations, pairs or edges; for `delayed_match` the delay.
        split: "train" or "test".

    Raises:
        UserError: kind or split is unknown, or the size is below 1, or too small for two splits.
    """
    if kind not in KINDS:
        raise UserError(f"kind: unknown task {kind!r} (known: {', '.join(KINDS)})")
    if split not in SPLITS:
        raise UserError(f"split: expected train or test, got {split!r}")
    if size < 1:
        raise UserError(f"size: must be at least 1, got {size}")
    draw = random.Random(f"{kind} {size} {split} {seed}")
    rejected = 0
    while rejected < _PATIENCE:
        prompt, answer = KINDS[kind](draw, size)
        rejected += 1
        if (zlib.crc32(prompt.encode()) % 4 == 0) == (split == "test"):
            rejected = 0
            yield Example(prompt, f" {answer}")
    raise UserError(f"size: {kind} of {size} has too few prompts for a {split} split")
