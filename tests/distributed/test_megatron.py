"""Megatron-Core's tensor-parallel layers compute what one process computes, and its data parallel
trains as FSDP2 does, in what both are called on: CPU tensors (`megatron_on_cpu`)."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from rondo.errors import UserError
from rondo.models import MIXERS, ModelConfig
from rondo.parallel.config import MegatronOptions, ParallelConfig
from rondo.parallel.engines import Updates, make_engine
from rondo.parallel.mesh import Layout, Ranks
from rondo.tests.distributed.engine_cases import Rows
from rondo.tests.distributed.megatron_cases import both, scenarios, steps
from rondo.tests.distributed.parity_cases import VOCAB, Run, train_all
from rondo.tests.distributed.spawn import run_ranks
from rondo.tests.distributed.test_parity import OPTIONS

MIXED = [*MIXERS, "grouped", "groups"]
PATTERNS = (MIXED[::2], MIXED[1::2])
"""Every registered mixer once; what adds up without a matrix (`bare`) is refused."""


def test_two_tensor_parallel_ranks_train_as_one_process() -> None:
    runs = [
        Run(
            ModelConfig(
                vocab_size=VOCAB,
                dim=32,
                num_layers=len(pattern),
                pattern=pattern,
                mixers=OPTIONS,
                ffn_dim=48,
                init_std=0.1,
                tie_embeddings=tied,
                logit_cap=1.0 if tied else None,
            ),
            Layout(),
        )
        for pattern, tied in zip(PATTERNS, (False, True), strict=True)
    ]
    over_ranks = [dataclasses.replace(r, layout=Layout(tp=2), engine="megatron") for r in runs]
    for alone, found in zip(
        train_all(runs), run_ranks(train_all, 2, over_ranks, timeout=200)[0], strict=True
    ):
        np.testing.assert_allclose(found["losses"], alone["losses"], rtol=1e-10)
        np.testing.assert_allclose(found["norms"], alone["norms"], rtol=1e-10)
        np.testing.assert_allclose(found["evaluated"], alone["evaluated"], rtol=1e-10)
        for what in ("gradients", "parameters"):
            assert found[what].keys() == alone[what].keys()
            for name, value in alone[what].items():
                np.testing.assert_allclose(
                    found[what][name], value, rtol=1e-8, atol=1e-10, err_msg=f"{what} {name}"
                )


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Rows]:
    folder = tmp_path_factory.mktemp("megatron")
    text = "".join(f"the number {i} has square {i * i} and cube {i**3}\n\n" for i in range(2000))
    (folder / "text.txt").write_text(text)
    return run_ranks(scenarios, 2, str(folder), timeout=240)[0]


def losses(rows: Rows) -> list[float]:
    return [row["loss"] for row in rows]


@pytest.mark.parametrize(
    ("key", "native", "count", "near"),
    [("float32", "native", 20, (1e-4, 1e-4)), ("bf16", "native bf16", 14, (7e-4, 2e-3))],
)
def test_megatrons_optimizer_trains_as_fsdp2_does_killed_and_started_again(
    rows: dict[str, Rows], key: str, native: str, count: int, near: tuple[float, float]
) -> None:
    """In bfloat16 too: both add gradients up and update in float32. A last digit there can round a
    parameter to the other neighbour, so that these limits are what bfloat16 itself changes of the
    run: 7e-4 of losses, 2e-3 of gradient norms."""
    found, expected = rows[key], rows[native]
    assert [row["step"] for row in found] == list(range(count))
    assert found[0].keys() == expected[0].keys()
    assert losses(found) == pytest.approx(losses(expected), abs=near[0])
    norms = [[row["grad_norm"] for row in each] for each in (found, expected)]
    assert norms[0] == pytest.approx(norms[1], rel=near[1])
    # What went on is what was killed, to the last bit.
    before = rows[f"before {key}"]
    assert len(before) == 13 and losses(found)[:13] == losses(before)


@pytest.mark.parametrize(
    ("key", "native"),
    [("from native", "native"), ("bf16 to native", "native bf16")],
)
def test_checkpoints_go_to_megatron_and_back(rows: dict[str, Rows], key: str, native: str) -> None:
    found, expected = rows[key], rows[native][10:]
    assert [row["step"] for row in found] == [row["step"] for row in expected]
    limit = 7e-4 if "bf16" in key else 1e-4
    assert losses(found) == pytest.approx(losses(expected), abs=limit)


def test_megatrons_optimizer_over_tensor_and_data_parallel_ranks() -> None:
    """Two by two ranks against one process: losses, norms, and a checkpoint's tensors, which
    gradients that are no numbers leave as they are."""
    config = ModelConfig(
        vocab_size=VOCAB,
        dim=32,
        num_layers=3,
        pattern=["attention", "mamba2", "gated_deltanet"],
        mixers=OPTIONS,
        ffn_dim=48,
        init_std=0.1,
    )
    run = Run(config, Layout(dp_shard=2, tp=2), engine="megatron")
    alone = steps(dataclasses.replace(run, layout=Layout(), engine="native"), MegatronOptions())
    of_ranks = run_ranks(both, 4, run, timeout=200)
    for found in of_ranks[0]:
        np.testing.assert_allclose(found["losses"], alone["losses"], rtol=1e-5)
        np.testing.assert_allclose(found["norms"], alone["norms"], rtol=1e-4)
        assert found["tensors"].keys() == alone["tensors"].keys()
        for name, value in alone["tensors"].items():
            np.testing.assert_allclose(
                found["tensors"][name], value, rtol=1e-3, atol=1e-5, err_msg=name
            )
            assert np.array_equal(found["again"][name], found["tensors"][name])
            assert np.array_equal(found["spoiled"][name], found["tensors"][name])
        assert not np.isfinite(found["spoiled norm"])
    # Moments are divided among ranks: together they hold each once, and what all of tp share twice.
    shares = [found[0]["held"] for found in of_ranks]
    assert alone["held"] <= sum(shares) < 1.3 * alone["held"]
    assert max(shares) < 0.4 * alone["held"]


@pytest.mark.quick
def test_megatrons_optimizer_is_refused_on_a_cpu() -> None:
    config = ModelConfig(vocab_size=VOCAB, dim=16, num_layers=1, pattern=["attention"])
    parallel = ParallelConfig(
        engine="megatron", megatron=MegatronOptions(distributed_optimizer=True)
    )
    ranks = Ranks(0, 1, torch.device("cpu"), None)
    with pytest.raises(UserError, match=r"distributed_optimizer: .* CUDA .* is on cpu"):
        make_engine(
            config,
            ranks,
            parallel,
            Updates(lambda _: [], 1.0, 1, 1),
            precision="float32",
            seed=0,
            length=8,
        )
