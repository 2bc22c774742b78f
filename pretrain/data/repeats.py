"""What reading data more than once costs, before and during a run.

Two results that do not contradict each other:

- **A whole corpus, a few times** (Muennighoff et al., *Scaling Data-Constrained Language Models*,
  2023): U unique tokens read E times are worth `D' = U + U R* (1 - exp(-(E - 1) / R*))` fresh ones,
  `R* = 15.4`. Four epochs are nearly free, and no number of them is worth more than 16.4 U.
- **A small part of the corpus, often** (Hernandez et al., *Scaling Laws and Interpretability of
  Learning from Repeated Data*, arXiv 2205.10487): between `4.2e6 N^-0.56` and `5.1e7 N^-0.50`
  repeats, N the parameters, a small repeated share harms a model much more than its size suggests:
  10% of the tokens made 800M parameters as good as 400M. Fewer repeats and many more are harmless.
  A text that occurs m times in a source that is read E times is read m E times.

The constants of both are fits by others, taken second-hand: use them as warnings, not predictions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from rondo.errors import UserError

R_STAR = 15.4
"""Repeats after which a further one is worth 1/e of a fresh epoch."""
MANY_EPOCHS = 4.0
"""Epochs of a source up to which repeating is nearly free."""
SMALL_SHARE = 0.5
"""The damage band is about a repeated share of the tokens up to this one; at 0.9 of them a run is
better described as reading a whole corpus again."""
HARMFUL_SHARE = 0.01
"""The smallest repeated share that the study looked at."""


def effective_tokens(unique: float, epochs: float) -> float:
    """Fresh tokens that `unique` tokens read `epochs` times are worth, D'; up to one epoch, the
    tokens read."""
    if epochs <= 1:
        return unique * epochs
    return unique + unique * R_STAR * -math.expm1(-(epochs - 1) / R_STAR)


def token_value(epochs: float) -> float:
    """Mean worth of a token over `epochs` epochs, relative to a fresh one: 0.931 after 4."""
    return 1.0 if epochs <= 1 else effective_tokens(1.0, epochs) / epochs


def damage_band(parameters: float) -> tuple[float, float]:
    """Repeats of a small part of the data between which a model of so many parameters is harmed."""
    return 4.2e6 * parameters**-0.56, 5.1e7 * parameters**-0.50


@dataclass(frozen=True)
class Repeats:
    """How a run reads one source."""

    name: str
    tokens: int
    """Tokens of the source that the run reads."""
    unique: int
    """Tokens that the source has."""
    share: float
    """Of the tokens that are new in the run: what is replayed is not counted."""
    copies: Mapping[int, float] = field(default_factory=dict)
    """By how often a text occurs in the source (more than once), the share of the source's tokens
    that such texts are."""

    @property
    def epochs(self) -> float:
        return self.tokens / self.unique

    @property
    def effective(self) -> float:
        """Fresh tokens that these are worth."""
        return effective_tokens(self.unique, self.epochs)


def account(
    names: Sequence[str],
    unique: Mapping[int, int],
    samples: Mapping[int, int],
    length: int,
    copies: Mapping[int, Mapping[int, float]] | None = None,
) -> list[Repeats]:
    """Repeats by source. `unique` tokens (where they are known), `samples` of `length` tokens each
    and `copies` (as in `Repeats`) are by the source's place in `names`."""
    total = max(1, sum(samples.values())) * length
    known = copies or {}
    return [
        Repeats(names[i], count * length, unique[i], count * length / total, known.get(i, {}))
        for i, count in samples.items()
        if i in unique
    ]


def check_epochs(found: Sequence[Repeats], limit: float) -> None:
    """Raises UserError, which names every source that is read more than `limit` times; 0 is no
    limit."""
    over = [each for each in found if limit and each.epochs > limit]
    if over:
        raise UserError(
            "\n".join(
                f"data.sources: {each.name} would be read {each.epochs:.2f} times, more than "
                f"data.max_epochs {limit:g}; fewer steps, a smaller weight or more text would do"
                for each in over
            )
        )


def warnings(found: Sequence[Repeats], parameters: int) -> list[str]:
    """What is worth knowing before a model of so many parameters is trained so."""
    low, high = damage_band(parameters)
    band = (
        f"in the band of {low:,.0f} to {high:,.0f} repeats in which a small repeated part harms a "
        f"model of {parameters:,} parameters"
    )
    lines = []
    for each in found:
        at = f"data.sources: {each.name} is read {each.epochs:.1f} times"
        if each.epochs > MANY_EPOCHS:
            lines.append(
                f"{at}; its {each.tokens:,} tokens are worth about {each.effective:,.0f} fresh "
                f"ones ({token_value(each.epochs):.0%}; up to {MANY_EPOCHS:.0f} epochs are nearly "
                "free)"
            )
        if HARMFUL_SHARE <= each.share <= SMALL_SHARE and low <= each.epochs <= high:
            lines.append(f"{at} and is {each.share:.1%} of the run's new tokens: {band}")
        if copied := _harmful_copies(each, low, high):
            lines.append(
                f"{copied}: {band}; rondo prepare --drop_duplicates true keeps one of each"
            )
    return lines


def _harmful_copies(each: Repeats, low: float, high: float) -> str | None:
    """Of the texts that occur more than once in a source, those that are read from `low` to `high`
    times: all together, as corpora have a few of every multiplicity."""
    shares = {
        times: each.share * share
        for times, share in each.copies.items()
        if low <= times * each.epochs <= high and each.share * share <= SMALL_SHARE
    }
    share = sum(shares.values())
    if share < HARMFUL_SHARE:
        return None
    least, most = min(shares), max(shares)
    times, read = f"{least:,}", f"{least * each.epochs:,.1f}"
    if most > least:
        times, read = f"{times} to {most:,}", f"{read} to {most * each.epochs:,.1f}"
    return (
        f"data.sources: documents that occur {times} times in {each.name} are read {read} times "
        f"and are {share:.1%} of the run's new tokens"
    )


def describe(found: Sequence[Repeats]) -> list[str]:
    """A line a source."""
    return [
        f"{each.name}: {each.share:.1%} of the new tokens, {each.tokens:,} of {each.unique:,} "
        f"unique ({each.epochs:.2f} epochs, worth {each.effective:,.0f} fresh tokens)"
        for each in found
    ]
