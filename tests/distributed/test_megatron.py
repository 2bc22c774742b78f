"""Megatron-Core's tensor-parallel layers compute what one process computes."""

from __future__ import annotations

import dataclasses

import numpy as np

from rondo.models import ModelConfig
from rondo.parallel.mesh import Layout
from rondo.tests.distributed.parity_cases import VOCAB, Run, train_all
from rondo.tests.distributed.spawn import run_ranks
from rondo.tests.distributed.test_parity import OPTIONS

PATTERNS = (["attention", "grouped", "mamba2", "gated_deltanet"], ["gla", "hgrn2", "retnet"])


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
