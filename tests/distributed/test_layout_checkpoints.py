"""What is saved under one layout loads under any other, to the bit, optimizer included."""

from __future__ import annotations

from pathlib import Path

import pytest

from rondo.models import ModelConfig
from rondo.parallel.mesh import Layout
from rondo.tests.conftest import every_test
from rondo.tests.distributed.layout_checkpoint_cases import save_or_load
from rondo.tests.distributed.parity_cases import VOCAB, Run
from rondo.tests.distributed.spawn import run_ranks

CONFIG = ModelConfig(
    vocab_size=VOCAB,
    dim=32,
    num_layers=4,
    pattern=["hgrn2", "gated_deltanet", "mamba2+toy_router", "attention"],
    mixers={
        "attention": {"num_heads": 4},
        "mamba2": {"head_dim": 8, "state_dim": 4},
        "hgrn2": {"head_dim": 8},
        "gated_deltanet": {"head_dim": 8, "num_heads": 4},
    },
    ffn_dim=44,  # an inner width that four ranks cannot halve again
    tie_embeddings=True,
)
SAVED = {
    "pp2-tp2": Run(CONFIG, Layout(pp=2, tp=2), "interleaved", "float32"),
    "cp2-tp2": Run(CONFIG, Layout(cp=2, tp=2), precision="float32"),
}
LOADED = {
    "one": Run(CONFIG, Layout(), precision="float32"),
    "tp2": Run(CONFIG, Layout(tp=2), precision="float32"),
    "dp_shard3": Run(CONFIG, Layout(dp_shard=3), precision="float32"),
    "pp2-dp_shard2": Run(CONFIG, Layout(pp=2, dp_shard=2), "zero_bubble", "float32"),
    "dp_shard2-tp2": Run(CONFIG, Layout(dp_shard=2, tp=2), precision="float32"),
}
CORE = {"adamw": ("one", "pp2-dp_shard2"), "muon": ("tp2", "dp_shard3")}
"""What loads without RONDO_TESTS=all."""


@pytest.mark.parametrize(("saved", "optimizer"), [("pp2-tp2", "adamw"), ("cp2-tp2", "muon")])
def test_any_layout_loads_any_other(saved: str, optimizer: str, tmp_path: Path) -> None:
    run = SAVED[saved]
    [digest, *others] = run_ranks(
        save_or_load, run.layout.size, run, str(tmp_path), optimizer, 4, True
    )
    assert set(others) == {digest}
    for name in LOADED if every_test() else CORE[optimizer]:
        other = LOADED[name]
        found = run_ranks(
            save_or_load, other.layout.size, other, str(tmp_path), optimizer, 5, False
        )
        assert set(found) == {digest}, name
