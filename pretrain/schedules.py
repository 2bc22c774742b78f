"""Learning-rate schedules: pure functions from the step to a share of the peak."""

from __future__ import annotations

import math

from rondo.pretrain.recipe import ScheduleConfig


def factor(step: int, steps: int, config: ScheduleConfig) -> float:
    """The learning rate of step `step` (0-based) of a run of `steps`, over the peak.

    Warm-up is linear and reaches 1 at step `warmup_steps`. Then "constant" stays at 1; "cosine"
    falls to `final_ratio` along half a cosine; "wsd" (warm-up, stable, decay: arXiv 2404.06395)
    stays at 1 and falls to `final_ratio` over its last `decay_steps`. The last step of the run is
    one step short of `final_ratio`, which step `steps` would have.
    """
    if step < config.warmup_steps:
        return (step + 1) / (config.warmup_steps + 1)
    if config.name == "constant":
        return 1.0
    if config.name == "cosine":
        progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
        return _between(config.final_ratio, 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))
    length = config.decay_steps or max(1, steps // 5)
    progress = min(1.0, max(0.0, (step - (steps - length)) / length))
    return decay(config.decay_shape, progress, config.final_ratio)


def decay(shape: str, progress: float, final: float) -> float:
    """From 1 at progress 0 to `final` at progress 1.

    "1-sqrt" is the shape that arXiv 2405.18392 found best; "exponential" halves at a constant
    rate and takes 1e-3 for a `final` of 0, which it cannot reach.
    """
    if shape == "linear":
        return _between(final, 1 - progress)
    if shape == "cosine":
        return _between(final, 0.5 * (1 + math.cos(math.pi * progress)))
    if shape == "1-sqrt":
        return _between(final, 1 - math.sqrt(progress))
    return max(final, 1e-3) ** progress


def _between(final: float, share: float) -> float:
    return final + (1 - final) * share
