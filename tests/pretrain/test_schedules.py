"""Schedules are pure functions with the values their formulas give."""

from __future__ import annotations

import itertools
import math

import pytest

from rondo.pretrain.recipe import ScheduleConfig
from rondo.pretrain.schedules import decay, factor

pytestmark = pytest.mark.quick


def values(steps: int, **options) -> list[float]:
    return [factor(step, steps, ScheduleConfig(**options)) for step in range(steps)]


def test_warmup_is_linear_and_reaches_the_peak() -> None:
    assert values(6, name="constant", warmup_steps=4) == [0.2, 0.4, 0.6, 0.8, 1.0, 1.0]


def test_cosine() -> None:
    got = values(110, name="cosine", warmup_steps=10, final_ratio=0.1)
    assert got[10] == 1.0
    assert got[60] == pytest.approx(0.55)  # half way down
    expected = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 25 / 100))
    assert got[35] == pytest.approx(expected)
    assert all(a >= b for a, b in itertools.pairwise(got[10:]))


@pytest.mark.parametrize(
    ("shape", "quarter"),
    [
        ("linear", 0.75),
        ("cosine", 0.5 * (1 + math.cos(math.pi / 4))),
        ("1-sqrt", 0.5),
        ("exponential", 1e-3**0.25),
    ],
)
def test_wsd_decays_at_the_end_only(shape: str, quarter: float) -> None:
    got = values(100, name="wsd", warmup_steps=5, decay_steps=40, decay_shape=shape, final_ratio=0)
    assert got[5:61] == [1.0] * 56
    assert got[70] == pytest.approx(quarter)
    assert decay(shape, 0.0, 0.1) == 1.0
    assert decay(shape, 1.0, 0.1) == pytest.approx(0.1)


def test_wsd_decays_over_a_fifth_by_default() -> None:
    got = values(100, name="wsd")
    assert got[80] == 1.0 and got[81] < 1.0
