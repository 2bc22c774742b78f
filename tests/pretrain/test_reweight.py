"""Weights of samples by their losses: values, invariants, warm-up."""

from __future__ import annotations

import math

import pytest
import torch

from rondo.kernels.cross_entropy.chunked import KEPT_BYTES
from rondo.kernels.segments import document_positions
from rondo.models import ModelConfig
from rondo.parallel.mesh import Layout, Ranks
from rondo.parallel.pipeline import MicroBatch
from rondo.pretrain.recipe import DataConfig, Recipe, ReweightConfig, SourceConfig
from rondo.pretrain.reweight import (
    STRATEGIES,
    Reweighting,
    SampleWeights,
    domain_names,
    sample_weights,
    sum_samples,
)

pytestmark = pytest.mark.quick
ALONE = Ranks(0, 1, torch.device("cpu"), None)
# Losses 1, 2, 3, 4, 5; by strategy and temperature.
TABLE = {
    ("linupper", 0.4): [0.0244, 0.0851, 0.2969, 0.2969, 0.2969],
    ("linupper", 1.0): [0.0926, 0.1526, 0.2516, 0.2516, 0.2516],
    ("linupper", 100): [0.1986, 0.1996, 0.2006, 0.2006, 0.2006],
    ("quadratic", 0.4): [0.0367, 0.2395, 0.4475, 0.2395, 0.0367],
    ("quadratic", 1.0): [0.1117, 0.2365, 0.3036, 0.2365, 0.1117],
    ("quadratic", 100): [0.1990, 0.2005, 0.2010, 0.2005, 0.1990],
    ("extremes", 0.4): [0.3766, 0.1079, 0.0309, 0.1079, 0.3766],
    ("extremes", 1.0): [0.2793, 0.1694, 0.1027, 0.1694, 0.2793],
    ("extremes", 100): [0.2008, 0.1998, 0.1988, 0.1998, 0.2008],
}


def weigh(losses, strategy="linupper", temperature=0.4, tokens=None, clip=0.0) -> torch.Tensor:
    losses = torch.tensor(losses) if isinstance(losses, list) else losses
    tokens = torch.full_like(losses, 7) if tokens is None else torch.tensor(tokens)
    return sample_weights(losses, tokens, strategy, temperature, clip)


@pytest.mark.parametrize(("strategy", "temperature"), TABLE)
def test_worked_example(strategy: str, temperature: float) -> None:
    got = weigh([1.0, 2.0, 3.0, 4.0, 5.0], strategy, temperature)
    assert got.tolist() == pytest.approx(TABLE[strategy, temperature], abs=5e-5)
    largest = {0.4: 12.2, 1.0: 2.72, 100: 1.01}[temperature]  # exp(1 / r): scores span [0, 1] here
    assert float(got.max() / got.min()) == pytest.approx(largest, abs=0.02)


def test_linear_weights_are_a_softmax_of_the_losses() -> None:
    got = weigh([1.0, 2.0, 3.0, 4.0, 5.0], "linear", 0.4)
    assert torch.allclose(got, (torch.arange(5.0).double() / 4 / 0.4).softmax(0))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_invariants(strategy: str) -> None:
    losses = 3 + torch.randn(64, generator=torch.Generator().manual_seed(0)).double()
    got = weigh(losses, strategy)
    assert got.sum() == pytest.approx(1, abs=1e-12) and (got > 0).all()
    assert got.max() / got.min() <= math.exp(1 / 0.4) * (1 + 1e-12)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(weigh(losses[order], strategy), got[order], rtol=1e-12)
    assert torch.allclose(weigh(5 * losses - 2, strategy), got, rtol=1e-9)
    assert torch.allclose(weigh(losses, strategy, 1e6), torch.full_like(got, 1 / 64), rtol=2e-6)
    assert weigh(torch.full((8,), 2.5), strategy).tolist() == [1 / 8] * 8


def test_shapes_of_the_strategies() -> None:
    losses = torch.linspace(1, 3, 41).double()
    upper = weigh(losses, "linupper")
    assert (upper.diff() >= 0).all() and upper.argmax() == 20 and (upper[20:] == upper[20]).all()
    for strategy, middle in (("quadratic", "argmax"), ("extremes", "argmin")):
        got = weigh(losses, strategy)
        assert torch.allclose(got, got.flip(0)) and getattr(got, middle)() == 20


def test_weights_belong_to_tokens() -> None:
    """Samples of other lengths start from other shares; the plain mean is over tokens."""
    tokens = [10.0, 30.0, 0.0, 60.0]
    flat = weigh([1.0, 2.0, 9.0, 3.0], temperature=1e9, tokens=tokens)
    assert flat.tolist() == pytest.approx([0.1, 0.3, 0.0, 0.6], abs=1e-8)
    got = weigh([1.0, 2.0, 9.0, 3.0], "linear", 0.5, tokens)
    parts = [10 * math.exp(0), 30 * math.exp(0.5 / 0.5), 0, 60 * math.exp(1 / 0.5)]
    assert got.tolist() == pytest.approx([part / sum(parts) for part in parts])
    assert weigh([1.0, 2.0], tokens=[0.0, 0.0]).tolist() == [0, 0]


def test_clipping_keeps_an_outlier_from_making_all_others_alike() -> None:
    losses = [*torch.linspace(1, 2, 100).tolist(), 1000.0]
    spread = weigh(losses)[:100]
    assert spread.max() / spread.min() < 1.01
    clipped = weigh(losses, clip=0.01)[:100]
    assert clipped.max() / clipped.min() == pytest.approx(math.exp(1 / 0.4), rel=1e-3)
    empty = weigh([*losses, 5e6], clip=0.01, tokens=[1.0] * 101 + [0.0])
    assert torch.allclose(empty[:100], clipped)


def test_a_loss_that_is_not_finite_is_not_hidden() -> None:
    assert weigh([1.0, math.nan, 2.0]).isnan().all()
    assert weigh([1.0, math.nan, 2.0], clip=0.1).isnan().all()


def reweighting(steps: int = 100, rows: int = 4, **options) -> Reweighting:
    data = DataConfig(
        [SourceConfig("a/books"), SourceConfig("b/code")],
        sequence_length=6,
        global_batch_size=rows,
        micro_batch_size=rows,
    )
    recipe = Recipe("x", ModelConfig(), steps, data=data, reweight=ReweightConfig(**options))
    return Reweighting(recipe, ALONE)


def test_temperature_by_step() -> None:
    options = {"strategy": "linupper", "temperature": 1.0, "warmup_steps": "4%"}

    def by_step(**more) -> list[float | None]:
        made = reweighting(**options, start_temperature=9.0, **more)
        return [made.temperature(step) for step in range(6)]

    assert by_step() == [None] * 4 + [1, 1]
    assert by_step(warmup="step") == [9] * 4 + [1, 1]
    assert by_step(warmup="linear") == [9, 7, 5, 3, 1, 1]
    halfway = 1 + 8 * (1 + math.cos(math.pi / 4)) / 2
    assert by_step(warmup="cosine")[:3] == pytest.approx([9, halfway, 5])
    assert reweighting(strategy="uniform").temperature(50) is None


def test_few_sequences_are_warned_of() -> None:
    [note] = reweighting(strategy="linear").notes(99)
    assert "4 sequences share each micro_batch's" in note
    assert not [*reweighting(strategy="linear", rows=32).notes(99)]
    assert not [*reweighting().notes(99)]


def test_logits_that_are_made_twice_are_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 32 sequences of 6 tokens in bfloat16, 384 bytes a word."""
    most = KEPT_BYTES // 384
    weighted = reweighting(strategy="linear", rows=32)
    assert not [*weighted.notes(most)] and not [*reweighting(rows=32).notes(most + 1)]
    [note] = weighted.notes(most + 1)
    assert f"{KEPT_BYTES >> 20} MiB and are made twice" in note
    assert "data.micro_batch_size 31 spares it" in note
    [note] = weighted.notes(40 * most)
    assert "a shorter sequence spares it" in note
    monkeypatch.setattr(Ranks, "layout", Layout(tp=2))
    assert not [*weighted.notes(40 * most)]  # they are in any case


def test_domains_have_short_names() -> None:
    sources = [SourceConfig(path) for path in ("a/web", "stdlib-code", "b/web", "hub/books:en")]
    assert domain_names(sources) == ["web-0", "stdlib-code", "web-2", "books:en"]


ROWS = torch.tensor([[0, 0, 0, 0, 1, 1], [0, 1, 1, 2, 3, 3], [0] * 6, [0, 0, 1, 1, 1, 1]])


def step_batch(rows: torch.Tensor = ROWS) -> MicroBatch:
    """Documents as in `rows`; no target across their borders."""
    targets = torch.ones_like(rows)
    targets[:, :-1][rows[:, 1:] != rows[:, :-1]] = -100
    return MicroBatch(torch.ones_like(rows), targets, rows, document_positions(rows))


def token_losses(batch: MicroBatch) -> torch.Tensor:
    made = torch.rand(batch.targets.shape, generator=torch.Generator().manual_seed(2))
    return (1 + made) * (batch.targets >= 0)


def test_weights_of_a_micro_batch_and_what_is_told_of_them() -> None:
    batch = step_batch()
    losses, valid = token_losses(batch), batch.targets >= 0
    made = SampleWeights(reweighting(strategy="linear"), 0.4, [batch], [[0, 1, 1, 0]])
    got = made(0, losses)
    means = losses.sum(1) / valid.sum(1)
    expected = weigh(means, "linear", tokens=valid.sum(1).tolist())
    total = int(valid.sum())
    times = expected * total / valid.sum(1)
    assert torch.allclose(got.double(), times[:, None].expand_as(got), rtol=1e-6)
    assert not got.requires_grad
    told = made.metrics(made.shares(), total)
    assert told["reweight/loss"] == pytest.approx(float((expected * means).sum()), rel=1e-6)
    assert told["reweight/largest_weight"] == pytest.approx(float(times.max()), rel=1e-6)
    assert told["reweight/lowest_loss"] == pytest.approx(float(means.min()), rel=1e-6)
    assert told["reweight/highest_loss"] == pytest.approx(float(means.max()), rel=1e-6)
    assert told["reweight/mass/books"] == pytest.approx(float(expected[[0, 3]].sum()), rel=1e-6)
    assert told["reweight/mass/code"] == pytest.approx(float(expected[[1, 2]].sum()), rel=1e-6)
    assert told["reweight/temperature"] == 0.4


def test_effective_samples_are_those_of_kish() -> None:
    """1 / sum of squared weights, where samples are of one length."""
    batch = step_batch(torch.zeros(4, 6, dtype=torch.long))
    losses = torch.tensor([1.0, 2.0, 3.0, 4.0])[:, None].expand(4, 6)
    made = SampleWeights(reweighting(strategy="quadratic"), 0.3, [batch], [[0] * 4])
    made(0, losses)
    weights = weigh([1.0, 2.0, 3.0, 4.0], "quadratic", 0.3)
    told = made.metrics(made.shares(), 24)
    assert told["reweight/effective_samples"] == pytest.approx(float(1 / weights.square().sum()))
    assert told["reweight/largest_weight"] == pytest.approx(float(4 * weights.max()))


def test_documents_have_weights_of_their_own() -> None:
    batch = step_batch()
    losses, valid = token_losses(batch), batch.targets >= 0
    made = SampleWeights(reweighting(strategy="extremes", unit="document"), 0.4, [batch], [[0] * 4])
    got = made(0, losses)
    spans = [(row, ROWS[row] == i) for row in range(4) for i in ROWS[row].unique()]
    tokens = [int((valid[row] & span).sum()) for row, span in spans]
    means = torch.stack(
        [losses[r][s].sum() / max(1, n) for (r, s), n in zip(spans, tokens, strict=True)]
    )
    expected = weigh(means, "extremes", tokens=tokens)
    assert 0 in tokens  # a document of one token, whose successor is no target
    for (row, span), n, weight in zip(spans, tokens, expected, strict=True):
        if n:
            wanted = torch.full((int(span.sum()),), float(weight) * sum(tokens) / n)
            assert torch.allclose(got[row][span], wanted, rtol=1e-6)
    assert made.metrics(made.shares(), sum(tokens))["reweight/mass/books"] == pytest.approx(1)


def test_a_fixed_scope_is_the_whole_step() -> None:
    """Two micro-batches of two rows, as one of four."""
    whole = step_batch()
    losses = token_losses(whole)
    halves = [MicroBatch(*(t[i : i + 2] for t in whole)) for i in (0, 2)]
    for unit in ("sequence", "document"):
        kind = reweighting(strategy="linupper", unit=unit, scope="global_batch")
        one = SampleWeights(kind, 0.4, [whole], [[0, 1, 0, 1]])
        two = SampleWeights(kind, 0.4, halves, [[0, 1], [0, 1]])
        two.fix([losses[:2], losses[2:]])
        expected = one(0, losses)
        got = torch.cat([two(0, losses[:2]), two(1, losses[2:])])
        assert torch.equal(got, expected)
        told = [made.metrics(made.shares(), int((whole.targets >= 0).sum())) for made in (one, two)]
        assert told[0] == pytest.approx(told[1], rel=1e-12)


def test_sums_by_sample() -> None:
    values = torch.rand(4, 6, dtype=torch.float64)
    expected = torch.zeros(4, 5, dtype=torch.float64).scatter_add_(1, ROWS, values)
    assert torch.allclose(sum_samples(values, ROWS, 5), expected)
    assert torch.allclose(sum_samples(values, ROWS * 0, 1), values.sum(1, keepdim=True))
