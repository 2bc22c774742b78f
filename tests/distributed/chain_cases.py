"""What ranks run in test_chain.py."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from rondo.kernels import memory_context, neural_memory
from rondo.parallel.chain import ChainOverRanks
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


def chain_over_ranks(name: str, batch: int, length: int) -> dict[str, float]:
    """Largest difference to the whole sequence in one process, by case; `length` tokens a rank."""
    chain = CHAINS[name]
    rank, size = dist.get_rank(), dist.get_world_size()
    total = length * size
    inputs = chain.inputs(total, batch, 0)
    earlier = chain.inputs(4, batch, 3)[: chain.sequences] + inputs[chain.sequences :]
    state = chain(chain.operator, earlier).state
    worst = {}
    for ids in (None, documents(total, size)[3 - batch :]):
        for first in (None, state):
            expected = _whole(chain, inputs, first, ids, rank, size)
            found = _split(chain, inputs, first, ids, rank, size)
            given = [name for name, x in (("documents", ids), ("state", first)) if x is not None]
            worst[f"{batch} rows, {length} tokens a rank, {given}"] = max(
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


def work_overlaps(name: str, folder: Path) -> list[str]:
    """What two ranks have done at once: the first does not begin its last part before the second
    has begun one, nor the second the gradient of its last before the first has got one. Rows are
    too few, so that parts are of heads too."""
    chain, rank = CHAINS[name], dist.get_rank()
    inputs = [x.requires_grad_() for x in chain.inputs(4, 1, 0)]
    ranks = ChainOverRanks(chain.operator, dist.group.WORLD)
    done: list[str] = []

    def operator(*tensors: Any, **options: Any) -> Any:
        part = len([word for word in done if word.startswith("part")])
        done.append(f"part {part}")
        if rank == 1:
            (folder / "forward").touch()
        elif part == 1:
            _wait_for(folder / "forward")
        found = chain.operator(*tensors, **options)
        if rank == 0:
            found.state[0].register_hook(lambda _: (folder / "backward").touch())
        elif part == 0:
            found.o.register_hook(lambda _: _wait_for(folder / "backward"))
        return found

    ranks.operator = operator
    chain(ranks, inputs).o.sum().backward()
    return done


def _wait_for(path: Path) -> None:
    for _ in range(3000):
        if path.exists():
            return
        time.sleep(0.01)
    raise AssertionError(f"no rank has come to {path.name} while another works")
