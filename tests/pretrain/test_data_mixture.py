"""Mixtures: counts near their shares at every prefix, and random access that agrees with them."""

import math

import numpy as np
import pytest

from rondo.pretrain.data.errors import DataError
from rondo.pretrain.data.mixture import Mixture


def weights_to_try():
    rng = np.random.default_rng(0)
    yield [1.0]
    yield [0.5, 0.3, 0.2]
    yield [0.95, 0.05]
    yield [1 / 3] * 3
    yield [0.5] + [0.5 / 30] * 30
    yield [2.0**-k for k in range(30)]
    yield [1.0, 1.0, *(1.618**k for k in range(1, 20))]
    for count in (3, 10, 30):
        yield list(rng.random(count) + 1e-3)
        yield list(rng.random(count) ** 8 + 1e-9)


@pytest.mark.parametrize("weights", list(weights_to_try()), ids=lambda w: str(len(w)))
def test_counts_stay_near_their_shares(weights):
    mixture = Mixture(weights)
    shares = np.array(weights) / math.fsum(weights)
    counts = np.zeros(len(weights))
    worst = 0.0
    for i in range(3000):
        source, k = mixture[i]
        assert k == counts[source]  # consecutive within the source, none lost or doubled
        counts[source] += 1
        worst = max(worst, np.abs(counts - shares * (i + 1)).max())
    assert worst <= (0.5 + 1e-9 if len(weights) == 2 else 1.69)
    assert mixture.counts(3000) == counts.tolist()


def greedy(weights, count):
    """The sources of samples by the rule of GPT-NeoX and Megatron-LM: furthest behind, next."""
    shares, counts, found = np.array(weights) / math.fsum(weights), np.zeros(len(weights)), []
    for i in range(count):
        found.append(int(np.argmax(shares * max(i, 1) - counts)))
        counts[found[-1]] += 1
    return found


@pytest.mark.parametrize("weights", list(weights_to_try()), ids=lambda w: str(len(w)))
def test_the_greedy_rule_reads_as_much_of_each_in_another_order(weights):
    """Published check values are of that rule: first samples, and counts within 1 of shares of two
    sources, within 2 of several. Counts here meet these bounds too."""
    shares, mixture = np.array(weights) / math.fsum(weights), Mixture(weights)
    orders = {"greedy": greedy(weights, 300), "own": [mixture[i][0] for i in range(300)]}
    for order in orders.values():
        counts = np.array([np.cumsum(np.array(order) == j) for j in range(len(weights))])
        away = np.abs(counts - shares[:, None] * np.arange(1, 301)).max()
        assert away <= (1 if len(weights) == 2 else 2)


def test_first_samples():
    """They are not those of the greedy rule."""
    begin = [0, 1, 2, 0, 1, 0, 2, 0, 1, 0, 0, 1, 2, 0, 1, 0, 2, 0, 1, 0]
    assert greedy([0.5, 0.3, 0.2], 20) == begin
    assert [i for i, j in enumerate(greedy([0.95, 0.05], 60)) if j == 1] == [1, 21, 41]
    first = [Mixture([0.5, 0.3, 0.2])[i][0] for i in range(20)]
    assert first == [0, 1, 0, 2, 0, 1, 0, 2, 0, 1, 0, 1, 0, 2, 0, 1, 0, 2, 0, 1]
    rare = Mixture([0.95, 0.05])
    assert [i for i in range(100) if rare[i][0] == 1] == [9, 29, 49, 69, 89]


def test_far_samples_are_as_cheap_and_exact():
    weights = [0.7, 0.2, 0.1]
    mixture = Mixture(weights)
    far = 10**15
    before = mixture.counts(far)
    assert sum(before) == far
    assert all(abs(c - w * far) <= 2 for c, w in zip(before, weights, strict=True))
    for i in range(far, far + 100):
        source, k = mixture[i]
        assert k == before[source]
        before[source] += 1
    assert mixture.counts(far + 100) == before


def test_scale_of_weights_does_not_matter():
    a, b = Mixture([3, 1, 4]), Mixture([6.0, 2.0, 8.0])
    assert [a[i] for i in range(500)] == [b[i] for i in range(500)]


@pytest.mark.parametrize("wrong", [0.0, -1.0, math.nan, math.inf])
def test_bad_weights(wrong):
    with pytest.raises(DataError, match=r"data\.sources\[1\]\.weight is"):
        Mixture([1.0, wrong])
    with pytest.raises(DataError, match=r"data\.sources is empty"):
        Mixture([])
