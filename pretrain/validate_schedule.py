"""Schedules, of the learning rate above all, that cannot be or do not fit their run."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

from rondo.pretrain.lengths import in_steps
from rondo.pretrain.plain import show
from rondo.pretrain.recipe import Recipe, ScheduleConfig
from rondo.pretrain.schedules import DECAYING, INFINITE, phases

LARGEST = 2**31 - 1
"""The largest count a recipe may hold."""


def schedule_problems(recipe: Recipe, *, fit: bool = True) -> list[str]:
    """What is wrong with a recipe's schedule, and with lengths elsewhere; each problem starts with
    its key. Without `fit` the schedule need not fit into `recipe.steps`."""
    found = [*_ratios(recipe), *_lengths(recipe)]
    if fit and not found and recipe.steps >= 1:
        found += _fit(recipe, _step_tokens(recipe))
    return found


def _ratios(recipe: Recipe) -> Iterator[str]:
    schedule = recipe.schedule
    if not 0 < schedule.peak_ratio <= 1:
        peak = show(schedule.peak_ratio)
        yield f"schedule.peak_ratio: must be above 0 and at most 1, got {peak}"
        return
    for name, limit in _limits(schedule).items():
        value, most = getattr(schedule, name), getattr(schedule, limit) if limit else 1.0
        if not 0 <= value <= most:
            of = f" (schedule.{limit})" if limit else ""
            yield f"schedule.{name}: must be from 0 to {show(most)}{of}, got {show(value)}"
    if schedule.name in INFINITE and schedule.constant_ratio == 0:
        yield "schedule.constant_ratio: must be above 0, got 0.0"
    if not 0 < schedule.timescale < math.inf:
        timescale = show(schedule.timescale)
        yield f"schedule.timescale: must be a finite number above 0, got {timescale}"


def _limits(schedule: ScheduleConfig) -> dict[str, str]:
    """By ratio, the ratio that it cannot be above; none is above 1."""
    limits = {"start_ratio": "peak_ratio", "final_ratio": "peak_ratio"}
    if schedule.name in INFINITE:
        limits |= {"constant_ratio": "peak_ratio", "final_ratio": "constant_ratio"}
    if schedule.name == "constant":
        limits["final_ratio"] = ""  # it never gets there
    return limits


def _step_tokens(recipe: Recipe) -> int:
    return max(1, recipe.data.global_batch_size * recipe.data.sequence_length)


def _lengths(recipe: Recipe) -> Iterator[str]:
    schedule = recipe.schedule
    yield from length_problems("schedule.warmup_steps", schedule.warmup_steps, recipe)
    yield from length_problems("schedule.cooldown_steps", schedule.cooldown_steps, recipe)
    yield from length_problems("schedule.decay_steps", schedule.decay_steps, recipe)
    for i, end in enumerate(schedule.decay_ends):
        yield from length_problems(f"schedule.decay_ends.{i}", end, recipe, least=1)
    yield from length_problems("reweight.warmup_steps", recipe.reweight.warmup_steps, recipe)


def length_problems(key: str, length: int | str, recipe: Recipe, least: int = 0) -> Iterator[str]:
    """What is wrong with the `length` at `key`, a share of which is one of `recipe.steps`."""
    try:
        steps = in_steps(length, max(1, recipe.steps), _step_tokens(recipe))
    except ValueError as error:
        words, _, hint = str(error).partition("; ")
        yield f"{key}: {words}, got {show(length)}{hint and f'; {hint}'}"
        return
    if not least <= steps <= LARGEST:
        got = f"{show(length)} ({steps} steps)" if isinstance(length, str) else show(length)
        yield f"{key}: must be at least {least} and at most {LARGEST}, got {got}"


def _fit(recipe: Recipe, step_tokens: int) -> Iterator[str]:
    """Whether the phases follow each other."""
    schedule, steps = recipe.schedule, recipe.steps
    lengths = phases(schedule, steps, step_tokens)
    parts = {"warm-up": lengths.warmup}
    if schedule.name in INFINITE:
        parts["cool-down"] = lengths.cooldown
    if schedule.name in DECAYING or (schedule.name in INFINITE and lengths.decay):
        parts["decay"] = lengths.decay
    if sum(parts.values()) > steps:
        words = " and ".join(f"{length} of {name}" for name, length in parts.items())
        words = words.replace(" of", " steps of", 1)
        yield f"schedule.warmup_steps: {words} do not fit into a run of {steps} steps"
    if schedule.name in INFINITE and lengths.cooldown == 0:
        yield f"schedule.cooldown_steps: {schedule.name} needs at least 1 step to cool down, got 0"
    for before, end in itertools.pairwise((lengths.warmup, *lengths.ends)):
        if schedule.name == "wsd_s" and end - before < lengths.decay:
            yield (
                f"schedule.decay_ends: {lengths.decay} steps of decay do not fit between steps "
                f"{before} and {end}"
            )
