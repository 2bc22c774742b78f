"""What a rank reads of a batch."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from rondo.parallel.mesh import Layout
from rondo.pretrain.batches import RankBatches, micro_batch
from rondo.pretrain.data import Batch
from rondo.pretrain.recipe import DataConfig

pytestmark = pytest.mark.quick
TOKENS = torch.arange(16).view(2, 8)
SEGMENTS = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2], [0, 0, 0, 0, 0, 0, 0, 0]])
POSITIONS = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 0], [0, 1, 2, 3, 4, 5, 6, 7]])


@pytest.mark.parametrize("cp", [1, 2, 4])
def test_sequence_ranks_hold_consecutive_stretches(cp: int) -> None:
    """And positions count from a document's start, wherever the cuts are."""
    batch = Batch(TOKENS, TOKENS + 1, SEGMENTS)
    parts = []
    for rank in range(cp):
        ranks = SimpleNamespace(
            layout=Layout(cp=cp), index={"cp": rank}.get, device=torch.device("cpu")
        )
        parts.append(micro_batch(batch, ranks))
    for name, expected in (
        ("tokens", TOKENS),
        ("targets", TOKENS + 1),
        ("segment_ids", SEGMENTS),
        ("positions", POSITIONS),
    ):
        pieces = [getattr(part, name) for part in parts]
        assert all(piece.shape == (2, 8 // cp) for piece in pieces)
        assert torch.equal(torch.cat(pieces, 1), expected), name


def test_counts_of_all_ranks_add_up_to_those_of_the_batch() -> None:
    """Tokens with a target, two bytes each, over 2 x 2 ranks; tensor-parallel ones count once."""
    draw = torch.Generator().manual_seed(0)
    targets = torch.randint(-3, 9, (4, 8), generator=draw)
    targets[targets < 0] = -100
    samples = SimpleNamespace(
        batch=lambda rows: Batch(targets[rows], targets[rows], torch.zeros_like(targets[rows]))
    )
    data, found = DataConfig(global_batch_size=4, micro_batch_size=1), torch.zeros(3)
    for place in range(8):
        shard, rest = divmod(place, 4)
        ranks = SimpleNamespace(
            layout=Layout(dp_shard=2, cp=2, tp=2), index={"cp": rest // 2}.get, data_index=shard,
            counts=rest % 2 == 0, device=torch.device("cpu"),
        )  # fmt: skip
        batches: Any = RankBatches(data, cast(Any, ranks), np.full(9, 2))
        chosen = list(batches.global_batch(samples, 0))
        assert len(chosen) == 2
        found += torch.tensor(batches.count(torch.tensor(1.0), chosen))
    valid = int((targets >= 0).sum())
    assert valid < 32 and found.tolist() == [4, valid, 2 * valid]
