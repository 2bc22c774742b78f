"""What ranks run in test_fast_weights_over_ranks.py."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rondo.kernels import fast_weights
from rondo.parallel.sequence import over_ranks
from rondo.tests.distributed.sequence_cases import part, weights
from rondo.tests.kernels.fast_weights_cases import Case, floats, make

CHUNK = 5
SETTINGS = [
    # Documents, tokens of the open chunks, momentum, order, update
    (False, None, True, "apply_then_update", "muon"),
    (True, None, True, "apply_then_update", "muon"),
    (True, (3, 0), True, "apply_then_update", "muon"),
    (False, (4, 1), False, "apply_then_update", "gradient"),
    (True, (0, 2), True, "update_then_apply", "muon"),
    (False, None, False, "update_then_apply", "gradient"),
]


def documents(total: int, length: int) -> Tensor:
    """Documents of one rank, of one token, across ranks; borders at and beside every cut."""
    starts = torch.zeros(2, total, dtype=torch.long)
    starts[0, ::length] = 1
    starts[1, length - 1 :: length + 1] = 1
    starts[1, -1] = 1
    return starts.cumsum(1) + 3


def equal_to_whole(lengths: list[int]) -> dict[str, float]:
    """Largest difference to one process, by case; `lengths` are tokens a rank."""
    worst = {}
    for length in lengths:
        for setting in SETTINGS:
            packed, opened, momentum, order, update = setting
            total = length * dist.get_world_size()
            case = make(total, momentum=momentum, open_tokens=opened)
            if packed:
                case = case._replace(ids=documents(total, length))
            options = {"order": order, "update": update, "chunk_size": CHUNK}
            worst[f"{length} tokens a rank, {setting}"] = difference(case, options)
    return worst


def with_some_gradients() -> dict[str, float]:
    """As `equal_to_whole`, where only one input requires a gradient, and only outputs, or only
    the state of the last rank, are used."""
    case = make(7 * dist.get_world_size(), open_tokens=(1, 2))
    case, worst = case._replace(ids=documents(7 * dist.get_world_size(), 7)), {}
    for name in ("q", "k", "learning_rates", "momentum", "gate", "state"):
        for used in ("outputs", "state"):
            options = {"chunk_size": CHUNK}
            worst[f"{name}, {used}"] = difference(case, options, {name}, {used})
    return worst


SEQUENCES = ("q", "k", "v", "learning_rates", "momentum")
ALL = frozenset({*SEQUENCES, "gate", "up", "down", "state"})


def difference(
    case: Case,
    options: dict[str, Any],
    wanted: frozenset[str] | set[str] = ALL,
    used: frozenset[str] | set[str] = frozenset({"outputs", "state"}),
) -> float:
    """Between the whole in one process and this rank's part of it: outputs, state, gradients."""
    rank, size = dist.get_rank(), dist.get_world_size()
    leaves, whole = _leaves(case, wanted)
    o, state = _run(fast_weights, whole, options)
    expected = [part(o.detach(), rank, size)]
    _backward(o, weights(o.shape), state, used)
    for name, x in leaves.items():
        if name in SEQUENCES:
            expected.append(part(x.grad, rank, size))
        else:  # only the last rank's state counts
            unread = name.startswith("state.") and rank < size - 1
            expected.append(None if unread else x.grad)

    leaves, mine = _leaves(_stretch(case, rank, size), wanted)
    o, last = _run(over_ranks(fast_weights, dist.group.WORLD), mine, options)
    found = [o.detach()]
    shape = torch.Size((len(o), o.shape[1] * size, *o.shape[2:]))
    _backward(o, part(weights(shape), rank, size), last if rank == size - 1 else None, used)
    for name, x in leaves.items():
        if name in ("gate", "up", "down"):  # each rank has a share of it
            dist.all_reduce(x.grad)
        found.append(x.grad)
    for name, x in zip(state._fields, state, strict=True):
        if x is not None:
            expected.append(x.detach())
            found.append(getattr(last, name).detach())
    return max(map(_gap, found, expected))


def _gap(found: Tensor | None, expected: Tensor | None) -> float:
    if expected is None:  # nothing depends on it
        return 0.0 if found is None else float(found.abs().max())
    assert found is not None, "a gradient is missing"
    return float((found - expected).abs().max())


def _run(operator: Callable[..., Any], case: Case, options: dict[str, Any]) -> Any:
    return operator(
        *case[:5],
        momentum=case.momentum,
        initial_state=case.state,
        segment_ids=case.ids,
        **options,
    )


def _leaves(case: Case, wanted: frozenset[str] | set[str]) -> tuple[dict[str, Tensor], Case]:
    """Copies that require gradients, by name, and the case made of them."""
    found = {}

    def leaf(name: str, x: Tensor, group: str) -> Tensor:
        if group not in wanted or not x.is_floating_point():
            return x
        found[name] = x.clone().requires_grad_()
        return found[name]

    changes = {n: leaf(n, x, n) for n in SEQUENCES if (x := getattr(case, n)) is not None}
    fast = case.weights._asdict().items()
    changes["weights"] = type(case.weights)(*(leaf(n, x, n) for n, x in fast))
    if case.state is not None:
        fields = case.state._asdict().items()
        changes["state"] = type(case.state)(
            *(None if x is None else leaf(f"state.{n}", x, "state") for n, x in fields)
        )
    return found, case._replace(**changes)


def _stretch(case: Case, rank: int, size: int) -> Case:
    """This rank's positions; of states only the last rank's has the numbers."""
    mine = case.part(slice(rank * case.v.shape[1] // size, (rank + 1) * case.v.shape[1] // size))
    if case.state is None or rank == size - 1:
        return mine
    return mine._replace(state=type(case.state)(*map(_nonsense, case.state)))


def _nonsense(x: Tensor | None) -> Tensor | None:
    return None if x is None else torch.full_like(x, 3 if x.dtype == torch.int64 else torch.nan)


def _backward(o: Tensor, weight: Tensor, state: Any, used: frozenset[str] | set[str]) -> None:
    loss = (o * weight).sum() * ("outputs" in used)
    if state is not None and "state" in used:
        loss = loss + sum((x * weights(x.shape)).sum() for x in floats(state))
    if loss.requires_grad:
        loss.backward()


@contextlib.contextmanager
def counted_sums() -> Iterator[list[torch.Size]]:
    """Shapes of what is summed over ranks inside."""
    found, all_reduce = [], dist.all_reduce

    def counting(x: Tensor, **options: Any) -> Any:
        found.append(x.shape)
        return all_reduce(x, **options)

    dist.all_reduce = counting
    try:
        yield found
    finally:
        dist.all_reduce = all_reduce


def sums_of_chunks(length: int) -> tuple[int, int, int]:
    """All-reduces forward, backward, and the number of chunks, full or open."""
    total = length * dist.get_world_size()
    _, case = _leaves(make(total), ALL)
    mine = _stretch(case, dist.get_rank(), dist.get_world_size())
    run = functools.partial(_run, over_ranks(fast_weights, dist.group.WORLD))
    with counted_sums() as forward:
        o, _ = run(mine, {"chunk_size": CHUNK})
    with counted_sums() as backward:
        o.sum().backward()
    return len(forward), len(backward), -(-total // CHUNK)


def refused() -> list[str]:
    """What is said of inputs that do not fit."""
    case, run = make(4), over_ranks(fast_weights, dist.group.WORLD)
    found = []
    for wrong, options in ((case._replace(k=case.k[:, :3]), {}), (case, {"backend": "reference"})):
        try:
            _run(run, wrong, options)
        except ValueError as error:
            found.append(str(error))
    return found
