"""What ranks run in test_chain.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from rondo.kernels import memory_context, neural_memory
from rondo.parallel.sequence import over_ranks
from rondo.tests.distributed.sequence_cases import documents, part, weights
from rondo.tests.kernels.test_memory_context import make
from rondo.tests.kernels.test_neural_memory import operands


class Chain(NamedTuple):
    """A nonlinear operator and inputs of it."""

    operator: Callable[..., Any]
    inputs: Callable[[int, int, int], list[Tensor]]
    """Of time, batch and seed: sequences, then parameters."""
    sequences: int
    """How many of the inputs are sequences."""
    groups: tuple[int, ...]
    """The parameters, as the operator takes them: this many in a tuple each."""
    options: dict[str, Any]

    def __call__(self, operator: Callable[..., Any], tensors: list[Tensor], **given: Any) -> Any:
        """`operator`, this one or its form over ranks, of flat tensors."""
        rest = iter(tensors[self.sequences :])
        groups = [tuple(next(rest) for _ in range(size)) for size in self.groups]
        return operator(*tensors[: self.sequences], *groups, **given, **self.options)


CHAINS = {
    "neural_memory": Chain(
        neural_memory,
        lambda time, batch, seed: operands(time, 2, batch=batch, seed=seed),
        sequences=6,
        groups=(2,),
        options={"chunk_size": 3},
    ),
    "memory_context": Chain(
        memory_context,
        lambda time, batch, seed: make(time, batch=batch, seed=seed),
        sequences=7,
        groups=(2, 3, 2),
        options={"chunk_size": 3, "segment_size": 6},
    ),
}


def chain_over_ranks(name: str, batch: int, time: int) -> dict[str, float]:
    """Largest difference to the whole sequence in one process, by case; `time` tokens a rank."""
    chain = CHAINS[name]
    rank, size = dist.get_rank(), dist.get_world_size()
    total = time * size
    inputs = chain.inputs(total, batch, 0)
    earlier = chain.inputs(4, batch, 3)[: chain.sequences] + inputs[chain.sequences :]
    state = chain(chain.operator, earlier).state
    worst = {}
    for ids in (None, documents(total, size)[3 - batch :]):
        for first in (None, state):
            expected = _whole(chain, inputs, first, ids, rank, size)
            found = _split(chain, inputs, first, ids, rank, size)
            given = [name for name, x in (("documents", ids), ("state", first)) if x is not None]
            worst[f"{batch} rows, {time} tokens a rank, {given}"] = max(
                float((a - b).abs().max()) for a, b in zip(found, expected, strict=True)
            )
    return worst


def _leaves(inputs: list[Tensor], state: Any) -> tuple[list[Tensor], Tensor | None, Any]:
    """Inputs, the numbers of the state, and the state, ready for gradients."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    if state is None:
        return leaves, None, None
    numbers = state[0].clone().requires_grad_()
    return leaves, numbers, type(state)(numbers, state[1])


def _whole(
    chain: Chain, inputs: list[Tensor], state: Any, ids: Tensor | None, rank: int, size: int
) -> list[Tensor]:
    leaves, numbers, state = _leaves(inputs, state)
    o, last, _ = chain(chain.operator, leaves, initial_state=state, segment_ids=ids)
    ((o * weights(o.shape)).sum() + (last[0] * weights(last[0].shape)).sum()).backward()
    found = [part(o.detach(), rank, size)]
    found += [part(x.grad, rank, size) for x in leaves[: chain.sequences]]
    found += [x.grad for x in leaves[chain.sequences :]]
    if rank == size - 1:
        found += [last[0].detach(), last[1]] + ([] if numbers is None else [numbers.grad])
    return found


def _split(
    chain: Chain, inputs: list[Tensor], state: Any, ids: Tensor | None, rank: int, size: int
) -> list[Tensor]:
    parts = [part(x, rank, size) for x in inputs[: chain.sequences]]
    leaves, numbers, state = _leaves([*parts, *inputs[chain.sequences :]], state)
    o, last, _ = chain(
        over_ranks(chain.operator, dist.group.WORLD),
        leaves,
        initial_state=state,
        segment_ids=None if ids is None else part(ids, rank, size),
    )
    shape = torch.Size((len(o), o.shape[1] * size, *o.shape[2:]))
    loss = (o * part(weights(shape), rank, size)).sum()
    if rank == size - 1:
        loss = loss + (last[0] * weights(last[0].shape)).sum()
    loss.backward()
    for x in leaves[chain.sequences :]:  # each rank has a share of the gradient
        dist.all_reduce(x.grad)
    found = [o.detach(), *(x.grad for x in leaves)]
    if rank == size - 1:
        found += [last[0].detach(), last[1]] + ([] if numbers is None else [numbers.grad])
    return found
