"""Adapters over ranks, and options that imported models have: training under any layout is training
in one process."""

from __future__ import annotations

import dataclasses

from rondo.models import ModelConfig
from rondo.parallel.mesh import Layout
from rondo.tests.distributed.parity_cases import VOCAB, Run, train, train_all
from rondo.tests.distributed.spawn import run_ranks
from rondo.tests.distributed.test_parity import compare

CONFIG = ModelConfig(
    vocab_size=VOCAB,
    dim=32,
    num_layers=2,
    ffn_dim=48,
    pattern=["liger", "attention"],
    mixers={
        "liger": {"num_heads": 4, "num_kv_heads": 2, "window": 9, "qk_norm": False},
        "attention": {"num_heads": 4},
    },
    init_std=0.1,
    tie_embeddings=True,
    lora_rank=3,
    lora_targets=["q_proj", "k_proj", "o_proj", "up_proj", "down_proj"],  # of every word
)
IMPORTED = dataclasses.replace(
    CONFIG,
    lora_rank=0,
    pattern=["attention"],
    mixers={
        "attention": {
            "num_heads": 4,
            "num_kv_heads": 2,
            "qkv_bias": True,
            "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 15},
        }
    },
    zero_centered_norms=True,
)
GATED = dataclasses.replace(
    IMPORTED, mixers={"attention": {"num_heads": 4, "output_gate": True, "rope_fraction": 0.5}}
)
LAYOUTS = [
    (Layout(tp=2), "selective"),
    (Layout(dp_shard=2), "full"),
    (Layout(cp=2), "none"),
    (Layout(pp=2), "none"),
]


def test_training_equals_one_process() -> None:
    runs = [Run(CONFIG, layout, checkpointing=mode) for layout, mode in LAYOUTS]
    runs += [Run(IMPORTED, layout) for layout in (Layout(tp=2), Layout(cp=2))]
    runs.append(Run(GATED, Layout(tp=2)))
    adapted, imported, gated = (train(Run(c, Layout())) for c in (CONFIG, IMPORTED, GATED))
    assert any(name.endswith("lora_a.weight") for name in adapted["gradients"])
    assert all(".lora_" in name for name in adapted["gradients"])
    assert {"blocks.0.mixer.q_proj.bias", "norm.offset"} <= imported["gradients"].keys()
    assert "blocks.0.mixer.gate_proj.weight" in gated["gradients"]
    results = run_ranks(train_all, 2, runs, timeout=200)
    for number, run in enumerate(runs):
        kinds = ((CONFIG, adapted), (IMPORTED, imported), (GATED, gated))
        expected = next(one for config, one in kinds if config is run.config)
        wrong = compare([of_rank[number] for of_rank in results], expected, 1e-10)
        assert not wrong, f"{run.layout}: {wrong[:5]}"
