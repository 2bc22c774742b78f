"""Adapters over ranks: training them under any layout is training them in one process."""

from __future__ import annotations

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
LAYOUTS = [
    (Layout(tp=2), "selective"),
    (Layout(dp_shard=2), "full"),
    (Layout(cp=2), "none"),
    (Layout(pp=2), "none"),
]


def test_training_adapters_equals_one_process() -> None:
    runs = [Run(CONFIG, layout, checkpointing=mode) for layout, mode in LAYOUTS]
    expected = train(Run(CONFIG, Layout()))
    assert any(name.endswith("lora_a.weight") for name in expected["gradients"])
    assert all(".lora_" in name for name in expected["gradients"])
    results = run_ranks(train_all, 2, runs, timeout=200)
    for number, (layout, _) in enumerate(LAYOUTS):
        wrong = compare([of_rank[number] for of_rank in results], expected, 1e-10)
        assert not wrong, f"{layout}: {wrong[:5]}"
