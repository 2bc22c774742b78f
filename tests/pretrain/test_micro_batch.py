"""What a rank reads of a batch."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from rondo.parallel.mesh import Layout
from rondo.pretrain.batches import micro_batch
from rondo.pretrain.data import Batch

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
