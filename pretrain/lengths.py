"""Lengths in a recipe: steps, tokens or a share of the run."""

from __future__ import annotations

import difflib
import math
import re
from fractions import Fraction

FORMS = 'steps (500), tokens ("16B tokens") or a share of the run ("1%")'
_FORM = re.compile(r"(\d+(?:\.\d+)?) *(?:(%)|([kMBT]?) *(steps?|tokens?))")
_UNITS = {"": 1, "k": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def in_steps(
    length: int | str, steps: int, step_tokens: int | None = None, *, up: bool = False
) -> int:
    """The steps of a `length` in a run of `steps`, each of `step_tokens` tokens; what is left of a
    step counts as one if `up`, else only where there is no other. Exact, whatever the size.

    Raises ValueError for text that is no length, or tokens without `step_tokens`.
    """
    if isinstance(length, int):
        return length
    form = _FORM.fullmatch(length.strip())
    if form is None:
        raise ValueError(f"expected {FORMS}{_nearest(length)}")
    number, percent, unit, of = form.groups()
    exact = Fraction(number)
    if percent:
        exact *= Fraction(steps, 100)
    else:
        exact *= _UNITS[unit]
        if of.startswith("token"):
            if step_tokens is None:
                raise ValueError(f"{length!r} needs the tokens of a step")
            exact /= step_tokens
    return math.ceil(exact) if up else max(math.floor(exact), min(1, math.ceil(exact)))


def _nearest(text: str) -> str:
    """What may have been meant."""
    found = re.match(r"\s*(\d[\d.]*)\s*(.*)", text)
    if found is None:
        return ""
    number, rest = found[1].rstrip("."), found[2]
    if not rest:
        return f"; did you mean {number} without quotes?"
    words = [f"{unit} {of}".strip() for unit in _UNITS for of in ("steps", "tokens")]
    near = difflib.get_close_matches(rest, ["%", *words], n=1, cutoff=0.4)
    space = "" if near and near[0][0] in "%kMBT" else " "
    return f'; did you mean "{number}{space}{near[0]}"?' if near else ""
