"""The parity matrix: training under any layout is training in one process.

Losses, every gradient, gradient norms and the parameters after two optimizer steps, with packed
documents. The matrix is made from the registry: a new mixer is in it without an edit.
`make test` runs the core of it, with RONDO_TESTS=all it runs all.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch

from rondo.models import MIXERS, ModelConfig
from rondo.parallel.mesh import Layout
from rondo.tests.conftest import every_test, slow_but
from rondo.tests.distributed.parity_cases import VOCAB, Run, train, train_all, train_by_library
from rondo.tests.distributed.spawn import run_ranks

OPTIONS = {
    "attention": {"num_heads": 4},
    "mamba2": {"head_dim": 8, "state_dim": 4},
    "retnet": {"num_heads": 4},
    "gla": {"num_heads": 4},
    "hgrn2": {"head_dim": 8},
    "deltanet": {"head_dim": 8, "num_heads": 4},
    "gated_deltanet": {"head_dim": 8, "num_heads": 4},
    "titans_memory": {"head_dim": 8, "num_heads": 4, "chunk_size": 5},
    "titans_mac": {"head_dim": 8, "chunk_size": 3, "segment_size": 6, "persistent_tokens": 3},
    "titans_mag": {"head_dim": 8, "chunk_size": 5, "window": 7, "persistent_tokens": 3},
    "grouped": {
        "kind": "attention",
        "num_heads": 4,
        "num_kv_heads": 2,
        "window": 9,
        "persistent_tokens": 3,
    },
    # Orthogonalised steps, less exact than the rest, are in test_lact.py.
    "lact": {"num_heads": 4, "chunk_size": 5, "init_rank": 4, "update": "gradient"},
    "liger": {"num_heads": 4, "num_kv_heads": 2, "window": 9, "qk_norm": False},
    "bare": {"kind": "slstm", "output_projection": False},
    "groups": {"kind": "mamba2", "head_dim": 8, "state_dim": 4, "num_groups": 2},
}
MIXED = [*MIXERS, "grouped", "bare", "toy+toy_router", "groups+toy_router", "toy"]
PATTERNS = {"mixed": MIXED, **{name: [name] for name in MIXERS}}
# Layout, schedule, activation checkpointing. With "ring" in the name states go from rank to rank.
LAYOUTS = {
    "tp2": (Layout(tp=2), "1f1b", "none"),
    "cp2": (Layout(cp=2), "1f1b", "none"),
    "cp4": (Layout(cp=4), "1f1b", "none"),
    "cp4-ring": (Layout(cp=4), "1f1b", "full"),
    "dp_shard2": (Layout(dp_shard=2), "1f1b", "selective"),
    "dp_replicate2": (Layout(dp_replicate=2), "1f1b", "full"),
    "pp2-gpipe": (Layout(pp=2), "gpipe", "none"),
    "pp2-1f1b": (Layout(pp=2), "1f1b", "full"),
    "pp2-interleaved": (Layout(pp=2), "interleaved", "none"),
    "pp2-zero_bubble": (Layout(pp=2), "zero_bubble", "none"),
    "tp2-cp2": (Layout(tp=2, cp=2), "1f1b", "selective"),
    "pp2-tp2": (Layout(pp=2, tp=2), "1f1b", "none"),
    "pp2-tp2-zero_bubble": (Layout(pp=2, tp=2), "zero_bubble", "none"),
    "pp2-cp2-interleaved": (Layout(pp=2, cp=2), "interleaved", "none"),
    "pp2-cp2-ring-zero_bubble": (Layout(pp=2, cp=2), "zero_bubble", "none"),
    "dp_replicate2-dp_shard2-tp2": (Layout(dp_replicate=2, dp_shard=2, tp=2), "1f1b", "none"),
    "pp2-cp2-tp2": (Layout(pp=2, cp=2, tp=2), "1f1b", "full"),
    "pp2-dp_shard2-cp2": (Layout(pp=2, dp_shard=2, cp=2), "zero_bubble", "none"),
}


CORE = ("tp2", "cp2", "pp2-1f1b", "dp_replicate2")
TOLERANCES = {"float64": 1e-10, "float32": 1e-5}
EACH = ("tp2",)
"""Layouts that every mixer meets alone too (RONDO_TESTS=all): they divide what it is made of."""
SINGLE = ("tp2", "cp2", "cp4-ring")
"""Layouts of the pattern of all mixers in float32 too, with its own weight for logits; tp2 always,
the others with RONDO_TESTS=all."""
ALIKE = ("lstm", "gru", "elman")
"""In the pattern of all mixers only: alone, `slstm` stands for the loop that all of them take in
float64 and in short documents; an LSTM by torch's own layer has a test below."""


def config(pattern: str, precision: str, tied: bool) -> ModelConfig:
    """Wide initial values bring out differences; in float32 they bring out one process's own
    rounding, up to 7e-5 of a gradient, where usual ones leave 2e-6. Where embeddings are `tied`
    logits have a cap, of about their own size."""
    entries = PATTERNS[pattern]
    return ModelConfig(
        vocab_size=VOCAB,
        dim=32,
        num_layers=max(4, len(entries)),  # four stages at most
        pattern=entries,
        mixers=OPTIONS,
        ffn_dim=48,
        init_std={"float64": 0.1, "float32": 0.02}[precision],
        tie_embeddings=tied,
        logit_cap=1.0 if tied else None,
    )


@functools.cache
def alone(pattern: str, precision: str, tied: bool) -> dict[str, Any]:
    """What one process gets."""
    sizes = config(pattern, precision, tied)
    return train(Run(sizes, Layout(), precision=precision))


def ratio(value: np.ndarray, expected: np.ndarray) -> float:
    """Norm of the difference over the norm of what is expected, if that is not zero."""
    return float(np.linalg.norm(value - expected) / (np.linalg.norm(expected) or 1.0))


def compare(ranks: list[dict[str, Any]], expected: dict[str, Any], tolerance: float) -> list[str]:
    """Where results differ by more than `tolerance`, relative to each tensor's norm."""
    wrong = []
    for key in ("losses", "norms", "evaluated", "similarity", "loads", "auxiliary", "routing"):
        for found in ranks:
            if not np.allclose(found[key], expected[key], rtol=tolerance, atol=0):
                wrong.append(f"{key}: {found[key]} instead of {expected[key]}")
    for kind in ("gradients", "parameters"):
        names = set().union(*(found[kind] for found in ranks))
        if names != expected[kind].keys():
            wrong.append(f"{kind}: {names ^ expected[kind].keys()} on one side only")
        for found in ranks:
            for name, value in found[kind].items():
                error = ratio(value, expected[kind][name])
                if not error <= tolerance:
                    wrong.append(f"{kind} of {name}: off by {error:.1e} of its norm")
    return wrong


def cases(layout: str) -> list[tuple[str, str, bool]]:
    """Pattern, precision, tied embeddings."""
    found = [("mixed", "float64", True)]
    if layout == "tp2" or (layout in SINGLE and every_test()):
        found += [("mixed", "float32", False)]
    if layout in EACH and every_test():
        found += [(name, "float64", False) for name in MIXERS if name not in ALIKE]
    return found


@pytest.mark.parametrize("name", slow_but(CORE, LAYOUTS))
def test_training_equals_one_process(name: str) -> None:
    layout, schedule, checkpointing = LAYOUTS[name]
    chosen = cases(name)
    exchange = "ring" if "ring" in name else "all_gather"
    kinds = {"schedule": schedule, "checkpointing": checkpointing, "exchange": exchange}
    runs = [
        Run(config(pattern, precision, tied), layout, precision=precision, **kinds)
        for pattern, precision, tied in chosen
    ]
    results = run_ranks(train_all, layout.size, runs, timeout=900)
    wrong = []
    for number, (pattern, precision, tied) in enumerate(chosen):
        ranks = [of_rank[number] for of_rank in results]
        expected = alone(pattern, precision, tied)
        problems = compare(ranks, expected, TOLERANCES[precision])
        wrong += [f"{pattern} {precision}: {problem}" for problem in problems]
    assert not wrong, "\n".join(wrong[:20])


@pytest.mark.slow
@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")
def test_an_lstm_by_the_library_equals_one_process() -> None:
    """In float32, rows of one document and 64 positions, which no case of the matrix has."""
    sizes = config("lstm", "float32", False)
    kinds: dict[str, Any] = {"precision": "float32", "time": 64, "packed": False}
    names = ("tp2", "dp_shard2", "pp2-1f1b")
    runs = []
    for name in names:
        layout, schedule, checkpointing = LAYOUTS[name]
        options = {"schedule": schedule, "checkpointing": checkpointing, **kinds}
        runs.append(Run(sizes, layout, **options))
    results = run_ranks(train_by_library, 2, runs, timeout=300)
    expected = train(Run(sizes, Layout(), **kinds))
    for number, name in enumerate(names):
        ranks = [of_rank[number] for of_rank in results]
        assert all(found["calls"] for found in ranks), name
        problems = compare(ranks, expected, TOLERANCES["float32"])
        assert not problems, f"{name}: " + "\n".join(problems[:20])


def test_a_difference_is_noticed() -> None:
    expected = alone("gla", "float64", False)
    other = {**expected, "gradients": dict(expected["gradients"])}
    name = next(iter(other["gradients"]))
    other["gradients"][name] = other["gradients"][name] * (1 + 1e-8)
    assert not compare([expected], expected, 1e-10)
    assert compare([other], expected, 1e-10)
