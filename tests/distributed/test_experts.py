"""Expert parallel: any division of the experts trains what one process trains."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rondo.models import ModelConfig
from rondo.models.ffn.dispatch import Choice, over_capacity
from rondo.parallel.mesh import Layout
from rondo.tests.conftest import every_test, slow_but
from rondo.tests.distributed.layout_checkpoint_cases import save_or_load
from rondo.tests.distributed.parity_cases import VOCAB, Run, dropped_by_rank, train, train_all
from rondo.tests.distributed.spawn import run_ranks
from rondo.tests.distributed.test_parity import compare

MODELS: dict[str, dict[str, Any]] = {
    "rmoe": {"moe": {"router": "rmoe", "shared_experts": 1, "z_loss": 1e-2}},
    "linear": {"moe": {"router": "linear", "bias_rate": 0.1}},
    "scores": {"moe": {"router": "xmoe_gru", "balance_loss": 0.0}},
    "frozen": {"moe": {"router": "rmoe", "freeze_router": True}},
}
# Options of the router, of the mixture: smaller models, many in one process group.
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "lstm": ({"dim": 12, "cell": "lstm"}, {"router": "rmoe"}),
    "alpha": ({"dim": 12, "passing": "none", "alpha": 0.5}, {"router": "rmoe"}),
    "shared_projection": ({"dim": 12, "shared_projection": True}, {"router": "rmoe"}),
    "hyper": ({"dim": 12}, {"router": "hyper"}),
    "cosine": ({}, {"router": "cosine"}),
    "mlp": ({"dim": 12}, {"router": "mlp"}),
    "xmoe": ({"dim": 6}, {"router": "xmoe", "bias_rate": 0.1}),
    "random": ({}, {"router": "random"}),
    "capacity": ({}, {"router": "linear", "capacity_factor": 0.75, "bias_rate": 0.1}),
    "tight": ({"dim": 12}, {"router": "rmoe", "capacity_factor": 0.4}),
}
ROUNDED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "bfloat16": ({"dim": 12}, {"router": "rmoe", "top_k": 4, "z_loss": 1e-2})
}
"""In bfloat16. Tokens go to all experts: between two about as good, rounding would choose."""
PRECISION = {True: ("bfloat16", 5e-2), False: ("float64", 1e-10)}
"""Of models in `ROUNDED` or not, and what results may differ by."""
LIMITED = ("capacity", "tight")
"""Of these experts drop choices: a third, and more than half."""
# Ranks, expert-parallel ranks, schedule, activation checkpointing.
LAYOUTS = {
    "ep2": (Layout(dp_shard=2), 2, "1f1b", "selective"),
    "ep4": (Layout(dp_shard=4), 4, "1f1b", "none"),
    "ep2-of-4": (Layout(dp_shard=4), 2, "1f1b", "full"),
    "ep2-tp2": (Layout(dp_shard=2, tp=2), 2, "1f1b", "none"),
    "ep2-pp2": (Layout(pp=2, dp_shard=2), 2, "1f1b", "none"),
    "ep2-pp2-zero_bubble": (Layout(pp=2, dp_shard=2), 2, "zero_bubble", "none"),
    "ep2-cp2": (Layout(dp_shard=2, cp=2), 2, "1f1b", "none"),
    "ep2-on-cp2": (Layout(cp=2), 2, "1f1b", "none"),
    "ep4-cp2": (Layout(dp_shard=2, cp=2), 4, "1f1b", "selective"),
    "ep2-dp_replicate2": (Layout(dp_replicate=2, dp_shard=2), 2, "1f1b", "none"),
    "cp2": (Layout(cp=2), 1, "1f1b", "selective"),
    "pp2": (Layout(pp=2), 1, "interleaved", "none"),
    "tp2-cp2": (Layout(tp=2, cp=2), 1, "1f1b", "none"),
    "dp_shard3": (Layout(dp_shard=3), 1, "1f1b", "none"),
}


def config(model: str) -> ModelConfig:
    """Dense layers first and between mixtures; of a variant, between mixtures."""
    options = {"num_experts": 4, "top_k": 2, "expert_dim": 24, "balance_loss": 0.5}
    if small := (VARIANTS | ROUNDED).get(model):
        of_router, more = small
        return ModelConfig(
            vocab_size=VOCAB,
            dim=32,
            num_layers=4,
            pattern=["attention+moe*2", "attention"],
            mixers={"attention": {"num_heads": 4}},
            ffn_dim=48,
            ffns={"moe": {**options, **more}},
            routers={more["router"]: of_router},
            init_std=0.1,
        )
    return ModelConfig(
        vocab_size=VOCAB,
        dim=32,
        num_layers=6,
        pattern=["attention", "gated_deltanet+moe", "attention+moe"],
        mixers={
            "attention": {"num_heads": 4},
            "gated_deltanet": {"head_dim": 8, "num_heads": 4},
        },
        ffn_dim=48,
        ffns={"moe": {**options, **MODELS[model]["moe"]}},
        routers={"rmoe": {"dim": 12}},
        init_std=0.1,
    )


def packed(model: str) -> bool:
    """Whether rows may have several documents: a token that begins two of them has the same
    probabilities in both, and which one exceeds the capacity is up to rounding."""
    return model not in LIMITED


@functools.cache
def alone(model: str, rows: int) -> dict[str, Any]:
    """What one process gets."""
    return train(run(model, Layout(), rows=rows))


def run(model: str, layout: Layout, **options: Any) -> Run:
    """A run of `model` in its precision."""
    precision, _ = PRECISION[model in ROUNDED]
    return Run(config(model), layout, precision=precision, packed=packed(model), **options)


@pytest.mark.parametrize("name", slow_but(("ep2", "ep2-cp2", "cp2"), LAYOUTS))
def test_training_equals_one_process(name: str) -> None:
    layout, ep, schedule, checkpointing = LAYOUTS[name]
    chosen = {
        "ep2": ["rmoe", *ROUNDED],
        "ep4": [*MODELS, "capacity"],
        "ep2-pp2": [*MODELS, *VARIANTS],
        "ep2-tp2": ["rmoe", *VARIANTS],
        "ep2-cp2": ["rmoe", "linear", "tight"],
        "ep4-cp2": ["rmoe", *LIMITED],
        "tp2-cp2": ["rmoe", *LIMITED],
        "cp2": [*LIMITED],
    }.get(name, ["rmoe"])
    rows = 9 if layout.data_size == 3 else 8
    options = {"schedule": schedule, "checkpointing": checkpointing, "ep": ep, "rows": rows}
    runs = [run(model, layout, **options) for model in chosen]
    results = run_ranks(train_all, layout.size, runs, timeout=600)
    wrong = []
    for number, model in enumerate(chosen):
        ranks = [of_rank[number] for of_rank in results]
        _, tolerance = PRECISION[model in ROUNDED]
        wrong += [f"{model}: {p}" for p in compare(ranks, alone(model, rows), tolerance)]
        expected = alone(model, rows)["domains"]
        wrong += [f"{model}: {r['domains']} by domain" for r in ranks if r["domains"] != expected]
    assert not wrong, "\n".join(wrong[:20])


SAVED = Run(config("rmoe"), Layout(dp_shard=4), precision="float32", ep=4)
LOADED = {
    "ep1": Run(config("rmoe"), Layout(), precision="float32"),
    "ep2": Run(config("rmoe"), Layout(dp_shard=2), precision="float32", ep=2),
    "ep2-tp2": Run(config("rmoe"), Layout(dp_shard=2, tp=2), precision="float32", ep=2),
    "dp_shard3": Run(config("rmoe"), Layout(dp_shard=3), precision="float32", rows=9),
    "ep2-of-4": Run(config("rmoe"), Layout(dp_shard=4), precision="float32", ep=2),
}


def test_any_division_of_experts_loads_any_other(tmp_path: Path) -> None:
    """Equal digests: every tensor of model and optimizer, to the bit, with all of its experts."""
    [digest, *others] = run_ranks(
        save_or_load, SAVED.layout.size, SAVED, str(tmp_path), "adamw", 4, True
    )
    assert set(others) == {digest}
    for name in LOADED if every_test() else ("ep2-tp2", "dp_shard3"):
        other = LOADED[name]
        found = run_ranks(save_or_load, other.layout.size, other, str(tmp_path), "adamw", 5, False)
        assert set(found) == {digest}, name


def test_other_routers_options_load_under_any_layout(tmp_path: Path) -> None:
    """Frozen, and with biases that the checkpoint lacks; stages have other layers' names."""
    trained = Run(config("rmoe"), Layout(), precision="float32")
    save_or_load(trained, str(tmp_path), "adamw", 4, True)
    frozen = config("frozen")
    frozen.ffns["moe"] |= {"shared_experts": 1, "bias_rate": 0.1}
    expected = save_or_load(
        Run(frozen, Layout(), precision="float32"), str(tmp_path), "adamw", 5, False
    )
    found = run_ranks(
        save_or_load,
        4,
        Run(frozen, Layout(pp=2, dp_shard=2), "interleaved", "float32", ep=2),
        str(tmp_path),
        "adamw",
        6,
        False,
    )
    assert set(found) == {expected}


@pytest.mark.parametrize("model", LIMITED)
def test_limited_experts_do_drop_choices(model: str) -> None:
    for dropped, _ in alone(model, 8)["loads"]:
        assert {"capacity": 0.2, "tight": 0.5}[model] < dropped < 0.8


def test_ranks_drop_what_the_whole_sequence_drops() -> None:
    """Scores of few values, so that many are equal: the earlier choices stay."""
    generator = torch.Generator().manual_seed(5)
    experts = torch.rand(2, 18, 4, generator=generator).topk(2).indices
    scores = torch.randint(1, 4, experts.shape, generator=generator) / 4
    for dtype in (torch.float32, torch.float64):
        choice = Choice(experts, scores.to(dtype), scores.to(dtype))
        expected = over_capacity(choice, 4, 0.7)
        assert 0 < expected.sum() < expected.numel()
        found = run_ranks(dropped_by_rank, 3, *(each.numpy() for each in choice))
        assert np.array_equal(np.concatenate(found, 1), expected.numpy())
