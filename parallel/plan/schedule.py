"""What a pipeline schedule costs: micro-batches in flight, and idle time.

Both formulas are those of the schedules that torch runs: a test replays torch's own tables of
actions and finds the same.
"""

from __future__ import annotations

from rondo.parallel.pipeline import SCHEDULES


def in_flight(schedule: str, pp: int, rank: int, micro_batches: int) -> int:
    """Most forward passes (of one stage and micro-batch) of a pipeline rank whose activations are
    held at once.

    gpipe runs all forward passes first; 1f1b runs as many as there are ranks from this one on;
    interleaved 1f1b (arXiv 2104.04473) warms up with a round of all stages but the last and two
    more passes for each rank behind this one. Zero bubble (arXiv 2401.10241) warms up with one more
    for each, but puts off the weights' gradients until every rank holds as much as the first.
    """
    if pp == 1:
        return 1
    if schedule == "gpipe":
        return micro_batches
    if schedule == "1f1b":
        return min(micro_batches, pp - rank)
    stages = SCHEDULES[schedule].stages_per_rank
    rounds = max(1, micro_batches // pp)
    warm_up = (stages - 1) * (micro_batches // rounds) + 2 * (pp - 1 - rank)
    if schedule == "zero_bubble":
        warm_up = (stages - 1) * (micro_batches // rounds) + pp - 1
    return min(stages * micro_batches, warm_up + 1)


def bubble(schedule: str, pp: int, micro_batches: int) -> float:
    """Idle share of a step's time on a pipeline rank, when every stage takes equally long and a
    backward pass twice a forward pass: (pp - 1) / (v M + pp - 1) for v stages a rank and M
    micro-batches. Zero bubble fills two thirds of it with the weights' gradients, which wait for
    nobody (arXiv 2401.10241, table 1, ZB-H1)."""
    if pp == 1:
        return 0.0
    idle = (pp - 1) / SCHEDULES[schedule].stages_per_rank
    if schedule == "zero_bubble":
        idle /= 3
    return idle / (micro_batches + idle)
