"""What ranks run in test_chain.py."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from rondo.kernels import neural_memory
from rondo.kernels.neural_memory import MemoryState
from rondo.parallel.sequence import over_ranks
from rondo.tests.distributed.sequence_cases import documents, part, weights
from rondo.tests.kernels.test_neural_memory import operands

CHUNK = 3


def memory_over_ranks(batch: int, time: int) -> dict[str, float]:
    """Largest difference to the whole sequence in one process, by case; `time` tokens a rank."""
    rank, size = dist.get_rank(), dist.get_world_size()
    total = time * size
    inputs = operands(total, 2, batch=batch)
    state = neural_memory(
        *operands(4, 2, batch=batch, seed=3)[:6], tuple(inputs[6:]), chunk_size=CHUNK
    ).state
    worst = {}
    for ids in (None, documents(total, size)[3 - batch :]):
        for first in (None, state):
            expected = _whole(inputs, first, ids, rank, size)
            found = _split(inputs, first, ids, rank, size)
            given = [name for name, x in (("documents", ids), ("state", first)) if x is not None]
            worst[f"{batch} rows, {time} tokens a rank, {given}"] = max(
                float((a - b).abs().max()) for a, b in zip(found, expected, strict=True)
            )
    return worst


def _leaves(inputs: list[Tensor], state: MemoryState | None) -> tuple[list[Tensor], Tensor | None]:
    values = None if state is None else state.values.clone().requires_grad_()
    return [x.clone().requires_grad_() for x in inputs], values


def _state(values: Tensor | None, state: MemoryState | None) -> MemoryState | None:
    return None if state is None or values is None else MemoryState(values, state.done)


def _whole(
    inputs: list[Tensor], state: MemoryState | None, ids: Tensor | None, rank: int, size: int
) -> list[Tensor]:
    leaves, values = _leaves(inputs, state)
    o, last, _ = neural_memory(
        *leaves[:6],
        tuple(leaves[6:]),
        initial_state=_state(values, state),
        segment_ids=ids,
        chunk_size=CHUNK,
    )
    ((o * weights(o.shape)).sum() + (last.values * weights(last.values.shape)).sum()).backward()
    found = [part(o.detach(), rank, size), *(part(x.grad, rank, size) for x in leaves[:6])]
    found += [x.grad for x in leaves[6:]]
    if rank == size - 1:
        found += [last.values.detach(), last.done] + ([] if values is None else [values.grad])
    return found


def _split(
    inputs: list[Tensor], state: MemoryState | None, ids: Tensor | None, rank: int, size: int
) -> list[Tensor]:
    parts = [part(x, rank, size) for x in inputs[:6]]
    leaves, values = _leaves([*parts, *inputs[6:]], state)
    o, last, _ = over_ranks(neural_memory, dist.group.WORLD)(
        *leaves[:6],
        tuple(leaves[6:]),
        initial_state=_state(values, state),
        segment_ids=None if ids is None else part(ids, rank, size),
        chunk_size=CHUNK,
    )
    shape = torch.Size((len(o), o.shape[1] * size, *o.shape[2:]))
    loss = (o * part(weights(shape), rank, size)).sum()
    if rank == size - 1:
        loss = loss + (last.values * weights(last.values.shape)).sum()
    loss.backward()
    for x in leaves[6:]:  # each rank has a share of the gradient
        dist.all_reduce(x.grad)
    found = [o.detach(), *(x.grad for x in leaves)]
    if rank == size - 1:
        found += [last.values.detach(), last.done] + ([] if values is None else [values.grad])
    return found
