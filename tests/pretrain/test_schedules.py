"""Schedules are pure functions with the values their formulas give."""

from __future__ import annotations

import itertools
import math
from typing import get_args, get_type_hints

import pytest

from rondo.pretrain.recipe import ScheduleConfig
from rondo.pretrain.schedules import decay, factor, phases

pytestmark = pytest.mark.quick
NAMES = get_args(get_type_hints(ScheduleConfig)["name"])
SHAPES = get_args(get_type_hints(ScheduleConfig)["decay_shape"])
# arXiv 2403.08763: 3e-4, 1.65e-4 and 3e-5.
INFINITE = {"warmup_steps": "1%", "cooldown_steps": "60%", "decay_steps": "14%", "timescale": 10.0}


def values(steps: int, **options) -> list[float]:
    return [factor(step, steps, ScheduleConfig(**options)) for step in range(steps)]


def test_warmup_is_linear_and_reaches_the_peak() -> None:
    assert values(6, name="constant", warmup_steps=4) == [0.2, 0.4, 0.6, 0.8, 1.0, 1.0]
    warm = values(6, name="constant", warmup_steps=4, start_ratio=0.5, peak_ratio=0.75)
    assert warm == pytest.approx([0.55, 0.6, 0.65, 0.7, 0.75, 0.75])


def test_cosine() -> None:
    got = values(110, name="cosine", warmup_steps=10, final_ratio=0.1)
    assert got[10] == 1.0
    assert got[60] == pytest.approx(0.55)  # half way down
    expected = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 25 / 100))
    assert got[35] == pytest.approx(expected)
    assert all(a >= b for a, b in itertools.pairwise(got[10:]))


def test_linear() -> None:
    got = values(100, name="linear", warmup_steps=20, final_ratio=0.2)
    assert got[20] == 1.0 and got[60] == pytest.approx(0.6)


def test_inverse_square_root() -> None:
    got = values(2000, name="inv_sqrt", warmup_steps=10, final_ratio=0.1)
    assert got[10] == 1.0 and got[40] == pytest.approx(0.5) and got[90] == pytest.approx(1 / 3)
    assert got[1001:] == [0.1] * 999
    assert values(3, name="inv_sqrt") == pytest.approx([1, 1, 0.5**0.5])


@pytest.mark.parametrize(
    ("shape", "quarter"),
    [
        ("linear", 0.75),
        ("cosine", 0.5 * (1 + math.cos(math.pi / 4))),
        ("1-sqrt", 0.5),
        ("exponential", 1e-3**0.25),
        ("megatron-exponential", 2 * 0.5**0.25 - 1),
        ("inverse", 1 / (0.25 / 1e-3 + 0.75)),
    ],
)
def test_wsd_decays_at_the_end_only(shape: str, quarter: float) -> None:
    got = values(100, name="wsd", warmup_steps=5, decay_steps=40, decay_shape=shape, final_ratio=0)
    assert got[5:61] == [1.0] * 56
    assert got[70] == pytest.approx(quarter)
    assert decay(shape, 0.0, 0.1) == 1.0
    assert decay(shape, 1.0, 0.1) == pytest.approx(0.1)


def test_an_exponential_decay_has_a_half_life() -> None:
    """MiniCPM's `0.5^((s - S) / T)`, for T = 5000 in a decay of 20,000 steps."""
    got = [decay("exponential", step / 20_000, 0.5**4) for step in (0, 5000, 10_000, 20_000)]
    assert got == pytest.approx([1, 0.5, 0.25, 0.0625])


def test_wsd_decays_over_a_fifth_by_default() -> None:
    got = values(100, name="wsd")
    assert got[80] == 1.0 and got[81] < 1.0
    late = values(100, name="wsd", warmup_steps=90)  # leaves ten steps
    assert late[89] < late[90] == 1.0 and late[91] < 1.0
    assert values(100, name="wsd", warmup_steps=100)[99] == pytest.approx(100 / 101)


@pytest.mark.parametrize("shape", SHAPES)
def test_wsd_without_a_stable_phase_is_its_decay(shape: str) -> None:
    got = values(50, name="wsd", decay_steps=50, decay_shape=shape)
    assert got == [decay(shape, step / 50, 0.1) for step in range(50)]


def test_wsd_s_goes_back_to_the_peak_after_each_decay() -> None:
    options = {"warmup_steps": 5, "decay_steps": 10, "decay_shape": "linear"}
    got = values(100, name="wsd_s", decay_ends=[30, "60%", 400], **options)
    for end in (30, 60, 100):  # each is a whole wsd run of that length, but for earlier decays
        alone = values(end, name="wsd", **options)
        assert got[end - 10 : end] == pytest.approx(alone[-10:])
    assert got[5:21] == [1.0] * 16 and got[30:51] == [1.0] * 21 and got[60:91] == [1.0] * 31


def test_infinite_schedules_have_the_values_of_their_paper() -> None:
    cosine, inverse = ScheduleConfig("infinite_cosine", **INFINITE), None
    inverse = ScheduleConfig("infinite_inv_sqrt", **INFINITE)
    assert 3e-4 * factor(310, 1000, cosine) == pytest.approx(2.325e-4, abs=1e-12)
    assert 3e-4 * factor(310, 1000, inverse) == pytest.approx(1.8563e-4, abs=5e-9)
    for config in (cosine, inverse):
        for step in (610, 700, 860):
            assert 3e-4 * factor(step, 1000, config) == pytest.approx(1.65e-4)
        assert 3e-4 * factor(930, 1000, config) == pytest.approx(7.0356e-5, abs=5e-10)
        assert 3e-4 * factor(1000, 1000, config) == pytest.approx(3e-5)
        assert factor(10, 1000, config) == 1.0


@pytest.mark.parametrize("name", ["infinite_cosine", "infinite_inv_sqrt"])
def test_without_an_anneal_the_constant_phase_has_no_end(name: str) -> None:
    """A longer run is the same so far: that is the point."""
    short = values(50, name=name, warmup_steps=4, cooldown_steps=20)
    assert values(500, name=name, warmup_steps=4, cooldown_steps=20)[:50] == short
    assert short[24:] == [pytest.approx(0.55)] * 26


def test_an_infinite_cosine_that_cools_to_the_end_is_a_cosine() -> None:
    options = {"warmup_steps": 10, "final_ratio": 0.1}
    infinite = values(
        200, name="infinite_cosine", cooldown_steps=190, constant_ratio=0.1, **options
    )
    assert infinite == pytest.approx(values(200, name="cosine", **options), rel=1e-12)


@pytest.mark.parametrize("timescale", [1e-6, 1.0, 10.0, 1e4])
def test_infinite_inverse_square_root_has_fixed_ends(timescale: float) -> None:
    got = values(
        300,
        name="infinite_inv_sqrt",
        cooldown_steps=200,
        constant_ratio=0.4,
        timescale=timescale,
    )
    assert got[0] == 1.0 and got[200] == pytest.approx(0.4)
    if timescale == 1e-6:
        assert got[:200] == pytest.approx([1 - 0.6 * step / 200 for step in range(200)])


def test_rewarming_reaches_the_old_peak_and_decays_again() -> None:
    """arXiv 2403.08763, a stage of 1000 steps with 1% warm-up, from 0 or from the old minimum."""
    for start in (0.0, 0.1):
        got = values(1000, name="cosine", warmup_steps="1%", start_ratio=start)
        assert start < got[0] < start + 0.1 and got[10] == 1.0
        assert got[505] == pytest.approx(0.55) and got[-1] == pytest.approx(0.1, abs=1e-5)


def test_without_rewarming_a_stage_goes_on_from_the_old_minimum() -> None:
    """arXiv 2407.07263: 4.5e-5, a tenth of the old peak, to a hundredth of that; the data changes
    at a fifth of it, which is after 71% of the stage."""
    config = ScheduleConfig("cosine", peak_ratio=0.1, final_ratio=0.001)
    assert 4.5e-4 * factor(0, 1000, config) == pytest.approx(4.5e-5)
    assert 4.5e-4 * factor(1000, 1000, config) == pytest.approx(4.5e-7)
    assert factor(711, 1000, config) == pytest.approx(0.02, rel=5e-3)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("peak", [1.0, 0.5])
def test_all_are_continuous_and_within_bounds(name: str, peak: float) -> None:
    options = {**INFINITE, "warmup_steps": 500, "peak_ratio": peak, "constant_ratio": 0.3}
    got = values(10_000, name=name, **options)
    assert got[500] == pytest.approx(peak)
    assert all(0.1 - 1e-12 <= value <= peak + 1e-12 for value in got[500:])
    # The steepest are 1-sqrt, which falls by 0.9 / sqrt(1400) at once, and 10% of a long warm-up.
    assert max(abs(a - b) for a, b in itertools.pairwise(got)) < 0.025


def test_lengths_in_tokens_and_shares() -> None:
    config = ScheduleConfig("infinite_cosine", "1.5M tokens", cooldown_steps="2k steps")
    config.decay_steps = "7%"
    assert phases(config, 10_000, 4096) == (367, 2000, 700, (10_000,))  # 366.2 steps
    assert factor(367, 10_000, config, 4096) == 1.0
    with pytest.raises(ValueError, match="needs the tokens of a step"):
        factor(0, 10_000, config)


@pytest.mark.parametrize("steps", [7, 99, 100, 999, 1001, 12_345])
def test_shares_that_make_a_whole_fit(steps: int) -> None:
    shares = {"warmup_steps": "0.7%", "cooldown_steps": "59.6%", "decay_steps": "39.7%"}
    found = phases(ScheduleConfig("infinite_cosine", **shares), steps)
    assert found.warmup >= 1 and steps - 2 <= sum(found[:3]) <= steps
