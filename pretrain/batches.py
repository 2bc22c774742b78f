"""A rank's share of the global batches, and of what they sum to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import numpy as np
import torch

from rondo.kernels.segments import document_positions
from rondo.parallel.mesh import Ranks
from rondo.parallel.pipeline import MicroBatch
from rondo.pretrain.data import Batch, count_bytes, rank_indices
from rondo.pretrain.recipe import DataConfig


class Samples(Protocol):
    """What batches are drawn from: `TokenDataset`, `Curriculum`."""

    def batch(self, indices: Sequence[int]) -> Batch:
        """The sequences at `indices`, stacked."""
        ...


class RankBatches:
    """What of every global batch is this rank's.

    Args:
        data: sizes of batches.
        ranks: all ranks.
        byte_lengths: bytes of text that each token id stands for.
    """

    def __init__(self, data: DataConfig, ranks: Ranks, byte_lengths: np.ndarray) -> None:
        self.data, self.ranks, self.byte_lengths = data, ranks, byte_lengths

    def steps(
        self, samples: Samples, start: int, stop: int
    ) -> Iterator[tuple[int, list[MicroBatch]]]:
        """Steps from `start` to before `stop`, with the micro-batches of each."""
        for step in range(start, stop):
            yield step, list(self.global_batch(samples, step))

    def global_batch(self, samples: Samples, number: int) -> Iterator[MicroBatch]:
        """The micro-batches of global batch `number`."""
        for chunk in self.indices(number):
            yield micro_batch(samples.batch(chunk), self.ranks)

    def indices(self, number: int) -> list[list[int]]:
        """The samples of each micro-batch of global batch `number`."""
        return rank_indices(
            number,
            self.data.global_batch_size,
            self.ranks.data_index,
            self.ranks.layout.data_size,
            self.data.micro_batch_size,
        )

    def count(
        self, nats: torch.Tensor, batches: Iterable[MicroBatch]
    ) -> tuple[float, float, float]:
        """This rank's share of the global sums of nats, valid tokens and bytes of text."""
        if not self.ranks.counts:
            return 0.0, 0.0, 0.0
        targets = [batch.targets.cpu() for batch in batches]
        valid = sum(int((each >= 0).sum()) for each in targets)
        return nats.item(), valid, sum(count_bytes(each, self.byte_lengths) for each in targets)


def micro_batch(batch: Batch, ranks: Ranks) -> MicroBatch:
    """This rank's stretch of the sequences of `batch`, on its device."""
    whole = (batch.tokens, batch.targets, batch.segment_ids, document_positions(batch.segment_ids))
    size, rank = ranks.layout.cp, ranks.index("cp")
    parts = (tensor.unflatten(1, (size, -1))[:, rank] for tensor in whole)
    return MicroBatch(*(part.to(ranks.device, non_blocking=True) for part in parts))
