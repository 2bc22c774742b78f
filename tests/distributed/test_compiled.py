"""Blocks that are compiled train under a layout as blocks that are not do in one process."""

from __future__ import annotations

import pytest

from rondo.models import ModelConfig
from rondo.parallel.mesh import Layout
from rondo.tests.distributed.parity_cases import VOCAB, Run, train, train_all
from rondo.tests.distributed.spawn import run_ranks
from rondo.tests.distributed.test_parity import compare

CONFIG = ModelConfig(
    vocab_size=VOCAB,
    dim=32,
    num_layers=2,
    pattern=["attention"],
    mixers={"attention": {"num_heads": 4}},
    ffn_dim=48,
)
LAYOUTS = (Layout(dp_shard=2), Layout(cp=2), Layout(pp=2))


@pytest.mark.slow
def test_compiled_blocks_under_layouts() -> None:
    runs = [Run(CONFIG, layout, precision="float32", compile=True) for layout in LAYOUTS]
    expected = train(Run(CONFIG, Layout(), precision="float32"))
    results = run_ranks(train_all, 2, runs, timeout=600)
    for number, run in enumerate(runs):
        wrong = compare([of_rank[number] for of_rank in results], expected, 1e-5)
        assert not wrong, f"{run.layout}: " + "\n".join(wrong[:10])
