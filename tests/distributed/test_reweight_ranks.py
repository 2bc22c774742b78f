"""Weighted training under any layout is weighted training in one process."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from rondo.models import ModelConfig
from rondo.parallel.mesh import Layout
from rondo.tests.distributed.parity_cases import VOCAB, Run, data
from rondo.tests.distributed.parity_cases import train as train_plainly
from rondo.tests.distributed.reweight_cases import Weighted, summed, train, train_all
from rondo.tests.distributed.spawn import run_ranks
from rondo.tests.distributed.test_parity import ratio

SEQUENCES = {"strategy": "linupper", "temperature": 0.2}
STEP = {**SEQUENCES, "scope": "global_batch"}
DOCUMENTS = {"strategy": "quadratic", "temperature": 0.3, "unit": "document", "clip_quantile": 0.05}
STEP_DOCUMENTS = {**DOCUMENTS, "scope": "global_batch"}
KINDS = [SEQUENCES, STEP, DOCUMENTS, STEP_DOCUMENTS]
MIXED = (7, 2, 5, 0, 3, 6, 1, 4)
TOLERANCE = 1e-9
# Layout, expert-parallel ranks, schedule.
LAYOUTS = {
    "dp_shard2": (Layout(dp_shard=2), 1, "1f1b"),
    "cp2": (Layout(cp=2), 1, "1f1b"),
    "tp2": (Layout(tp=2), 1, "1f1b"),
    "two nodes": (Layout(dp_replicate=2, dp_shard=2), 1, "1f1b"),
    "two nodes, one shard": (Layout(dp_shard=4), 4, "1f1b"),
    "dp_shard2-cp2": (Layout(dp_shard=2, cp=2), 2, "1f1b"),
    "dp_shard2-tp2": (Layout(dp_shard=2, tp=2), 1, "1f1b"),
    "pp2-dp_shard2": (Layout(pp=2, dp_shard=2), 1, "1f1b"),
    "pp2-dp_shard2-gpipe": (Layout(pp=2, dp_shard=2), 1, "gpipe"),
    "pp2-cp2-interleaved": (Layout(pp=2, cp=2), 1, "interleaved"),
    "pp2-dp_shard2-zero_bubble": (Layout(pp=2, dp_shard=2), 2, "zero_bubble"),
    "pp2-dp_shard2-tp2": (Layout(pp=2, dp_shard=2, tp=2), 1, "1f1b"),
}


def config() -> ModelConfig:
    """A mixture of experts with an auxiliary loss, which is not weighted, among dense layers. The
    balance loss is taken over a micro-batch of all ranks."""
    return ModelConfig(
        vocab_size=VOCAB,
        dim=32,
        num_layers=4,
        pattern=["attention", "gated_deltanet+moe"],
        mixers={
            "attention": {"num_heads": 4},
            "gated_deltanet": {"head_dim": 8, "num_heads": 4},
        },
        ffn_dim=48,
        ffns={"moe": {"num_experts": 4, "top_k": 2, "expert_dim": 24, "z_loss": 1e-2}},
        init_std=0.1,
    )


@functools.cache
def alone(kind: int, order: tuple[int, ...], data_size: int) -> dict[str, Any]:
    """What one process gets from the micro-batches of so many data-parallel ranks together."""
    return train(Weighted(Run(config(), Layout()), KINDS[kind], order, Layout(dp_shard=data_size)))


def weights_of(ranks: list[dict[str, Any]], step: int) -> dict[int, torch.Tensor]:
    """How often each token counts, by row, put together from what `ranks` have of it; ranks that
    have the same agree."""
    parts: dict[tuple[int, int], torch.Tensor] = {}
    for found in ranks:
        for place, weight in found["weights"][step].items():
            assert parts.setdefault(place, weight).equal(weight), place
    return {
        row: torch.cat([parts[place] for place in sorted(parts) if place[0] == row])
        for row, _ in parts
    }


def differences(ranks: list[dict[str, Any]], expected: dict[str, Any]) -> list[str]:
    wrong = []
    for step in range(len(expected["losses"])):
        weights, whole = weights_of(ranks, step), weights_of([expected], step)
        assert weights.keys() == whole.keys() == set(MIXED)
        for row, weight in weights.items():
            if not torch.allclose(weight, whole[row], rtol=TOLERANCE, atol=0):
                wrong.append(f"step {step}: row {row} counts {weight} times, not {whole[row]}")
    for found in ranks:
        for step in range(len(expected["losses"])):
            told = {"loss": found["losses"][step], **found["told"][step]}
            wanted = {"loss": expected["losses"][step], **expected["told"][step]}
            if told != pytest.approx(wanted, rel=TOLERANCE):
                wrong.append(f"step {step}: {told} instead of {wanted}")
            for name, value in found["gradients"][step].items():
                error = ratio(value, expected["gradients"][step][name])
                if not error <= TOLERANCE:
                    wrong.append(f"step {step}: gradient of {name} off by {error:.1e} of its norm")
    names = set().union(*(found["gradients"][0] for found in ranks))
    assert names == expected["gradients"][0].keys()
    return wrong


@pytest.mark.parametrize("name", LAYOUTS)
def test_weighted_training_equals_one_process(name: str) -> None:
    layout, ep, schedule = LAYOUTS[name]
    run = Run(config(), layout, schedule, ep=ep)
    cases = [Weighted(run, options, MIXED) for options in KINDS]
    results = run_ranks(train_all, layout.size, cases, timeout=300)
    wrong = []
    for kind in range(len(KINDS)):
        expected = alone(kind, MIXED, layout.data_size)
        found = differences([of_rank[kind] for of_rank in results], expected)
        wrong += [f"{KINDS[kind]}: {one}" for one in found]
    assert not wrong, "\n".join(wrong[:20])


def test_weights_do_not_depend_on_how_samples_fall_on_ranks() -> None:
    """Over the whole step, any order on one process and on four ranks is the same. Without
    mixtures, whose balance loss is that of a micro-batch."""
    dense = ModelConfig(
        vocab_size=VOCAB, dim=32, num_layers=2, pattern=["attention"], ffn_dim=48,
        mixers={"attention": {"num_heads": 4}}, init_std=0.1,
    )  # fmt: skip
    expected = train(Weighted(Run(dense, Layout()), STEP))
    assert not differences([train(Weighted(Run(dense, Layout()), STEP, MIXED))], expected)
    cases = [Weighted(Run(dense, Layout(dp_shard=4)), STEP, o) for o in (MIXED, MIXED[::-1])]
    cases.append(Weighted(cases[0].run, {**SEQUENCES, "temperature": 1e9}))
    results = run_ranks(train_all, 4, cases)
    no_reweighting([of_rank[2] for of_rank in results], train_plainly(Run(dense, Layout())))
    counted = data(Run(dense, Layout())).targets >= 0
    for number in range(2):
        of_ranks = [of_rank[number] for of_rank in results]
        assert not differences(of_ranks, expected)
        weights = weights_of(of_ranks, 0)
        total = sum(float((weights[row] * counted[row]).sum()) for row in MIXED)
        assert total == pytest.approx(int(counted.sum()), rel=1e-12)  # all ranks' sum to 1
    by_hand = summed(Weighted(Run(dense, Layout()), STEP))
    assert expected["losses"][0] == pytest.approx(by_hand["loss"], rel=1e-12)
    assert expected["told"][0]["reweight/loss"] == pytest.approx(by_hand["weighted"], rel=1e-12)
    for name, value in expected["gradients"][0].items():
        assert ratio(value, by_hand["gradients"][name]) < 1e-10, name


def test_scopes_differ() -> None:
    """Weights within micro-batches are not those of the whole step, or no test above tells."""
    assert differences([alone(0, MIXED, 1)], alone(1, MIXED, 1))


def no_reweighting(ranks: list[dict[str, Any]], plain: dict[str, Any]) -> None:
    """Loss and gradients of the first step are those of plain training."""
    for flat in ranks:
        told = flat["told"][0]
        assert told["reweight/loss"] == pytest.approx(plain["losses"][0], rel=1e-8)
        assert flat["losses"][0] == pytest.approx(plain["losses"][0], rel=1e-12)
        assert told["reweight/largest_weight"] == pytest.approx(1, rel=1e-8)
        for name, value in flat["gradients"][0].items():
            assert ratio(value, plain["gradients"][name]) < 1e-8, name


def test_a_high_temperature_is_no_reweighting() -> None:
    """In one process; `test_weights_do_not_depend_on_how_samples_fall_on_ranks` has four ranks."""
    run = Run(config(), Layout())
    flat = train(Weighted(run, {**SEQUENCES, "temperature": 1e9}))
    no_reweighting([flat], train_plainly(run))
