"""The LaCT block with orthogonalised steps trains under layouts as in one process."""

from __future__ import annotations

from typing import Any

import pytest

from rondo.models import ModelConfig
from rondo.parallel.mesh import Layout
from rondo.tests.distributed.parity_cases import VOCAB, Run, train, train_all
from rondo.tests.distributed.spawn import run_ranks
from rondo.tests.distributed.test_parity import compare

# An orthogonalised step lifts what rounding leaves in small singular values, and is blind to a
# common factor of the rates, so that their bias has nearly no gradient; 2e-10 is found.
TOLERANCE = 5e-9


def config(**changes: Any) -> ModelConfig:
    options = {"num_heads": 4, "chunk_size": 5, "init_rank": 4, "window": 7, **changes}
    return ModelConfig(
        vocab_size=VOCAB,
        dim=32,
        num_layers=4,
        pattern=["lact"],
        mixers={"lact": options},
        ffn_dim=48,
        init_std=0.1,
    )


@pytest.mark.parametrize(
    ("layout", "schedule"),
    [
        (Layout(tp=2), "1f1b"),
        (Layout(cp=2), "1f1b"),
        (Layout(pp=2), "zero_bubble"),
        (Layout(pp=2, cp=2), "zero_bubble"),
    ],
)
def test_orthogonalised_steps_under_layouts(layout: Layout, schedule: str) -> None:
    sizes = config()
    results = run_ranks(train_all, layout.size, [Run(sizes, layout, schedule)])
    ranks = [found[0] for found in results]
    assert not compare(ranks, train(Run(sizes, Layout())), TOLERANCE)


@pytest.mark.parametrize("layout", [Layout(dp_shard=2), Layout(dp_replicate=2), Layout(cp=2)])
def test_rows_without_a_full_chunk(layout: Layout) -> None:
    """Only the first row has one: elsewhere weights are read and never updated."""
    sizes = config(chunk_size=13, update="gradient")
    results = run_ranks(train_all, layout.size, [Run(sizes, layout)])
    ranks = [found[0] for found in results]
    assert not compare(ranks, train(Run(sizes, Layout())), 1e-10)
