"""Sharded and replicated training equals one process."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch.optim import Muon

from rondo.parallel.muon import ShardedMuon
from rondo.tests.distributed.data_parallel_cases import norm_with_one_bad_rank, train
from rondo.tests.distributed.spawn import run_ranks


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("layout", [(1, 2), (2, 1), (2, 2)], ids=str)
def test_layouts_equal_one_process(layout: tuple[int, int], optimizer: str, tmp_path: Path) -> None:
    train(None, optimizer, str(tmp_path / "one"))
    run_ranks(train, layout[0] * layout[1], layout, optimizer, str(tmp_path / "many"))
    one, many = (json.loads((tmp_path / name).read_text()) for name in ("one", "many"))
    assert one["start"] == many["start"]  # the same initial values, bit for bit
    # Muon's Newton-Schulz iteration runs in bfloat16.
    tolerance = 1e-5 if optimizer == "adamw" else 1e-3
    for (loss, norm), (other_loss, other_norm) in zip(one["rows"], many["rows"], strict=True):
        assert other_loss == pytest.approx(loss, rel=tolerance)
        assert other_norm == pytest.approx(norm, rel=10 * tolerance)


def test_all_ranks_see_a_gradient_that_is_not_finite_on_one() -> None:
    norms = run_ranks(norm_with_one_bad_rank, 2)
    assert not any(map(math.isfinite, norms))


def test_sharded_muon_is_torchs_muon() -> None:
    generator = torch.Generator().manual_seed(0)
    start, *grads = (torch.randn(24, 40, generator=generator) for _ in range(4))
    results = []
    for kind in (Muon, ShardedMuon):
        param = torch.nn.Parameter(start.clone())
        optimizer = kind([param], lr=0.1, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
        for grad in grads:
            param.grad = grad.clone()
            optimizer.step()
        results.append(param.detach())
    assert torch.equal(*results)
    assert not torch.equal(results[0], start)
