"""Learning-rate schedules: pure functions from the step to a share of optimizer.lr.

A step is its 0-based number; lr(step `steps`) is where a run of `steps` would arrive, so its last
step is one short of that.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from rondo.pretrain.lengths import in_steps
from rondo.pretrain.recipe import ScheduleConfig

DECAYING = ("wsd", "wsd_s")
INFINITE = ("infinite_cosine", "infinite_inv_sqrt")
_LEAST = 1e-3
"""Stands for a final share of 0 in shapes that cannot reach it."""


class Phases(NamedTuple):
    """Lengths of a schedule's phases, in steps."""

    warmup: int
    cooldown: int
    decay: int
    ends: tuple[int, ...]
    """Steps at which a decay has ended, in order; the last is the end of the run."""


def phases(config: ScheduleConfig, steps: int, step_tokens: int | None = None) -> Phases:
    """The phases of a run of `steps`, each of `step_tokens` tokens (which only lengths in tokens
    need). A warm-up is rounded up and the others down, so that shares that make 100% always fit.
    Raises ValueError for lengths that are none."""
    warmup = in_steps(config.warmup_steps, steps, step_tokens, up=True)
    decay = in_steps(config.decay_steps, steps, step_tokens)
    if config.name in DECAYING and not decay:
        decay = min(max(1, steps // 5), max(0, steps - warmup))
    ends = {in_steps(end, steps, step_tokens) for end in config.decay_ends}
    inner = sorted(end for end in ends if end < steps) if config.name == "wsd_s" else []
    return Phases(
        warmup,
        in_steps(config.cooldown_steps, steps, step_tokens),
        decay,
        (*inner, steps),
    )


def factor(step: int, steps: int, config: ScheduleConfig, step_tokens: int | None = None) -> float:
    """The learning rate of step `step` (0-based) of a run of `steps`, over optimizer.lr.

    Warm-up is linear from `start_ratio` and reaches `peak_ratio` at step `warmup_steps`; step 0 is
    the first on the way, not 0, which would waste it. From there on, with x from 0 to 1 along a
    phase:

    - "constant" stays; "linear" and "cosine" (half a one) fall to `final_ratio` at the end;
    - "inv_sqrt" is `peak sqrt(warmup / step)`, not below `final_ratio` (Megatron-LM);
    - "wsd" (warm-up, stable, decay: arXiv 2404.06395) stays, and falls to `final_ratio` over its
      last `decay_steps` along `decay_shape`;
    - "wsd_s" (arXiv 2410.05192) does so before each of `decay_ends` too, and goes back to the peak
      from the decayed weights at once: one run, a model for each budget;
    - "infinite_cosine" and "infinite_inv_sqrt" (arXiv 2403.08763) cool down from the peak to
      `constant_ratio` along half a cosine or `h(x) / h(1)`, h(x) = 1 / sqrt(1 + timescale x) - 1,
      stay, and anneal over the last `decay_steps`: `constant (final / constant)^x`.

    Raises ValueError for lengths that are none, or in tokens without `step_tokens`.
    """
    lengths = phases(config, steps, step_tokens)
    if step < lengths.warmup:
        rise = config.peak_ratio - config.start_ratio
        return config.start_ratio + rise * (step + 1) / (lengths.warmup + 1)
    return config.peak_ratio * _AFTER_WARMUP[config.name](step, lengths, config)


def decay(shape: str, progress: float, final: float) -> float:
    """From 1 at progress 0 to `final` at progress 1.

    - "linear", "cosine"; "1-sqrt", which arXiv 2405.18392 found best;
    - "exponential" halves at a constant rate, as arXiv 2404.06395 does: a half-life of T steps in a
      decay of L is a `final` of 0.5^(L / T);
    - "megatron-exponential" falls as 2 * 0.5^x - 1, Megatron-LM's shape of that name;
    - "inverse" is linear in the inverse of the rate, as in arXiv 2410.05192.

    "exponential" and "inverse" take 1e-3 for a `final` of 0, which they cannot reach.
    """
    if shape == "exponential":
        return max(final, _LEAST) ** progress
    if shape == "inverse":
        return 1 / (progress / max(final, _LEAST) + (1 - progress))
    return _between(final, _SHARES[shape](progress))


_SHARES: dict[str, Callable[[float], float]] = {
    "linear": lambda x: 1 - x,
    "cosine": lambda x: 0.5 * (1 + math.cos(math.pi * x)),
    "1-sqrt": lambda x: 1 - math.sqrt(x),
    "megatron-exponential": lambda x: 2 * 0.5**x - 1,
}


def _between(final: float, share: float) -> float:
    return final + (1 - final) * share


def _progress(step: int, start: int, end: int) -> float:
    return min(1.0, max(0.0, (step - start) / max(1, end - start)))


# Each takes a step after the warm-up, and gives the rate over the peak.


def _constant(step: int, lengths: Phases, config: ScheduleConfig) -> float:
    return 1.0


def _to_the_end(step: int, lengths: Phases, config: ScheduleConfig) -> float:
    progress = _progress(step, lengths.warmup, lengths.ends[-1])
    return decay(config.name, progress, config.final_ratio / config.peak_ratio)


def _inv_sqrt(step: int, lengths: Phases, config: ScheduleConfig) -> float:
    share = math.sqrt(max(1, lengths.warmup) / max(1, step))
    return max(share, config.final_ratio / config.peak_ratio)


def _stable_decay(step: int, lengths: Phases, config: ScheduleConfig) -> float:
    end = next((end for end in lengths.ends if end > step), lengths.ends[-1])
    progress = _progress(step, end - lengths.decay, end)
    return decay(config.decay_shape, progress, config.final_ratio / config.peak_ratio)


def _infinite(step: int, lengths: Phases, config: ScheduleConfig) -> float:
    constant = config.constant_ratio / config.peak_ratio
    if step < lengths.warmup + lengths.cooldown:
        progress = (step - lengths.warmup) / lengths.cooldown
        return _between(constant, _cooldown(progress, config))
    if not lengths.decay:
        return constant
    end = lengths.ends[-1]
    progress = _progress(step, end - lengths.decay, end)
    return constant * decay("exponential", progress, config.final_ratio / config.constant_ratio)


def _cooldown(progress: float, config: ScheduleConfig) -> float:
    if config.name == "infinite_cosine":
        return decay("cosine", progress, 0.0)

    def h(u: float) -> float:
        return math.expm1(-0.5 * math.log1p(config.timescale * u))

    return 1 - h(progress) / h(1.0)


_AFTER_WARMUP: dict[str, Callable[[int, Phases, ScheduleConfig], float]] = {
    "constant": _constant,
    "linear": _to_the_end,
    "cosine": _to_the_end,
    "inv_sqrt": _inv_sqrt,
    "wsd": _stable_decay,
    "wsd_s": _stable_decay,
    "infinite_cosine": _infinite,
    "infinite_inv_sqrt": _infinite,
}
