"""The capacity of experts where each rank holds a stretch of every sequence.

Which choices an expert drops depends on the scores of the whole sequence: ranks exchange experts
and scores, in float32 `8 (P - 1) B L k` bytes for the L tokens of a rank in each of B sequences, k
experts a token.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from rondo.models.ffn.dispatch import Choice, over_capacity
from rondo.parallel.collectives import gather_time
from rondo.parallel.summaries import as_bits, as_ids


def capacity_over_ranks(
    group: dist.ProcessGroup, choice: Choice, count: int, factor: float
) -> Tensor:
    """`over_capacity` of this rank's stretch `(B, T / P, k)` among the whole sequences."""
    length, k = choice.experts.shape[1:]
    scores = choice.scores.detach()
    sent = torch.cat((scores, as_bits(choice.experts, scores.dtype)), -1)
    scores, bits = gather_time(sent, group).split(k, -1)
    dropped = over_capacity(Choice(as_ids(bits).long(), scores, scores), count, factor)
    return dropped.narrow(1, dist.get_rank(group) * length, length)
