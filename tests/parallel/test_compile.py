"""A compiled block computes what an eager one does."""

from __future__ import annotations

import pytest
import torch

from rondo.models import ModelConfig
from rondo.parallel.build import ParallelModel
from rondo.parallel.config import ParallelConfig
from rondo.parallel.mesh import Ranks
from rondo.parallel.pipeline import MicroBatch

CONFIG = ModelConfig(
    vocab_size=30,
    dim=16,
    num_layers=2,
    pattern=["attention"],
    mixers={"attention": {"num_heads": 2}},
)


def losses(compile: bool) -> tuple[float, float]:
    """Loss and gradient norm of one process."""
    ranks = Ranks(0, 1, torch.device("cpu"), None)
    model = ParallelModel(
        CONFIG, ranks, ParallelConfig(), precision="float32", seed=0, length=11, compile=compile
    )
    tokens = torch.arange(24).view(2, 12)
    ids = torch.zeros_like(tokens[:, 1:])
    positions = torch.arange(11).expand(2, 11)
    loss = model.forward_backward([MicroBatch(tokens[:, :-1], tokens[:, 1:], ids, positions)])
    return loss.item(), model.gradient_norm()


def test_compiled_blocks_equal_eager_ones() -> None:
    assert losses(True) == pytest.approx(losses(False), rel=1e-5)
