"""What ranks run in test_sequence.py."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rondo.kernels import (
    gated_delta_rule,
    gated_linear_attention,
    l2_norm,
    linear_scan,
    mlstm,
    short_conv,
)
from rondo.kernels.segments import document_positions
from rondo.kernels.summary import Stretch
from rondo.models import MIXERS, ModelConfig
from rondo.models.config import make_options
from rondo.models.init import initial_values
from rondo.models.mixer import SequenceContext
from rondo.parallel import collectives, sequence
from rondo.parallel.config import Exchange
from rondo.parallel.sequence import over_ranks, shard_sequence

BATCH, HEADS, KEYS, VALUES = 3, 2, 3, 4


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def operands(time: int) -> dict[str, tuple[Callable[..., Any], list[Tensor], Tensor]]:
    """Operator, its tensors, and an initial state, by name of the case."""
    q, v = draw(BATCH, time, HEADS, KEYS), draw(BATCH, time, HEADS, VALUES)
    k = l2_norm(draw(BATCH, time, HEADS, KEYS))
    beta = 2 * draw(BATCH, time, HEADS).sigmoid()
    head, key = (-draw(BATCH, time, HEADS, *more).exp() for more in ((), (KEYS,)))
    state = draw(BATCH, HEADS, KEYS, VALUES)
    wide = state.sum((1, 2, 3))[:, None].expand(-1, 5)
    a, b = draw(BATCH, time, 5).tanh(), draw(BATCH, time, 5)
    grouped = [q[:, :, :1], k[:, :, :1], v, head]
    conv = [draw(BATCH, time, 5), draw(5, 4), draw(5)]
    mlstm_operands = [q, k, v, 2 * draw(BATCH, time, HEADS), draw(BATCH, time, HEADS)]
    return {
        "linear_scan": (linear_scan, [a, b], wide),
        "attention, no decay": (gated_linear_attention, [q, k, v], state),
        "attention, decay a head": (gated_linear_attention, [q, k, v, head], state),
        "attention, decay a key": (gated_linear_attention, [q, k, v, key], state),
        "attention, one group": (gated_linear_attention, grouped, state),
        "delta rule": (gated_delta_rule, [q, k, v, beta], state),
        "delta rule, decay a head": (gated_delta_rule, [q, k, v, beta, head], state),
        "delta rule, decay a key": (gated_delta_rule, [q, k, v, beta, key], state),
        "mlstm": (mlstm, mlstm_operands, mlstm(*mlstm_operands)[1]),
        "conv": (short_conv, conv, draw(BATCH, 3, 5)),
    }  # fmt: skip


def documents(time: int, size: int) -> Tensor:
    """One document over all ranks; a border exactly at every cut, and a document of one token;
    a document over several ranks that begins and ends inside one."""
    starts = torch.zeros(BATCH, time, dtype=torch.long)
    starts[1, :: time // size] = 1
    starts[1, -1] = 1
    starts[2, [1, time - time // size // 2 - 1]] = 1
    return starts.cumsum(1) + 70_000


def operators_over_ranks(lengths: list[int], exchange: Exchange) -> dict[str, float]:
    """Largest difference to the whole sequence in one process, by case."""
    rank, size = dist.get_rank(), dist.get_world_size()
    worst = {}
    for length in lengths:
        torch.manual_seed(length)
        ids = documents(length * size, size)
        for name, (operator, tensors, state) in operands(length * size).items():
            for segments in (None, ids):
                for first in (None, state):
                    inputs = {"documents": segments, "state": first}
                    given = [text for text, x in inputs.items() if x is not None]
                    label = f"{name}, {length} tokens a rank, {given}"
                    expected = whole(operator, tensors, first, segments, rank, size)
                    run = over_ranks(operator, dist.group.WORLD, exchange)
                    found = split(run, tensors, first, segments, rank, size)
                    worst[label] = max(
                        float((a - b).abs().max()) / (1 + float(b.abs().max()))
                        for a, b in zip(found, expected, strict=True)
                    )
    return worst


def halves_and_whole(length: int) -> tuple[dict[str, float], list[str]]:
    """Largest difference of operators in halves (of rows, of heads) to operators in one, by case;
    and what happens in which order in one of them."""
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(length)
    ids, worst, events = documents(length * size, size), {}, []
    for name, (operator, tensors, state) in operands(length * size).items():
        if operator is short_conv:
            continue
        for cut, rows in (("rows", slice(None)), ("heads", slice(2, 3))):
            arguments = [x[rows] for x in tensors], state[rows], ids[rows], rank, size
            found = []
            for sequence._LONG in (0, 2**40):
                run = over_ranks(operator, dist.group.WORLD)
                with recorded(run) as events_of_this:
                    found.append(split(run, *arguments))
                events = events or events_of_this
            worst[f"{name}, {cut}"] = max(
                float((a - b).abs().max()) for a, b in zip(*found, strict=True)
            )
    return worst, events


@contextlib.contextmanager
def recorded(run: Any) -> Iterator[list[str]]:
    """Starts and ends of collectives, and the passes of `run` from the state to the outputs."""
    events: list[str] = []
    begin, flight = run._begin, collectives._Flight
    start, reduce, land = collectives._start_gathering, collectives._start_reducing, flight.land

    def told(event: str, function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *arguments: events.append(event) or function(*arguments)

    def passed(*arguments: Any) -> Stretch:
        summary, finish = begin(*arguments)

        def finished(state: Tensor) -> tuple[Tensor, Tensor]:
            events.append("forward")
            o, last = finish(state)
            o.register_hook(lambda grad: events.append("backward"))
            return o, last

        return Stretch(summary, finished)

    run._begin, flight.land = passed, told("end", land)
    collectives._start_gathering = told("start", start)
    collectives._start_reducing = told("start", reduce)
    try:
        yield events
    finally:
        flight.land = land
        collectives._start_gathering, collectives._start_reducing = start, reduce


def weights(shape: torch.Size) -> Tensor:
    """A fixed direction to differentiate along."""
    return torch.linspace(-1, 1, shape.numel(), dtype=torch.float64).view(shape)


def whole(
    operator: Callable[..., Any],
    tensors: list[Tensor],
    state: Tensor | None,
    ids: Tensor | None,
    rank: int,
    size: int,
) -> list[Tensor]:
    """This rank's part of outputs and gradients of the whole."""
    leaves = [x.clone().requires_grad_() for x in tensors]
    first = None if state is None else state.clone().requires_grad_()
    o, last = operator(*leaves, initial_state=first, segment_ids=ids)
    ((o * weights(o.shape)).sum() + (last * weights(last.shape)).sum()).backward()
    found = [part(o.detach(), rank, size)]
    found += [part(x.grad, rank, size) if is_sequence(x, ids, o) else x.grad for x in leaves]
    if rank == size - 1:
        found += [last.detach()] + ([] if first is None else [first.grad])
    return found


def split(
    run: Callable[..., Any],
    tensors: list[Tensor],
    state: Tensor | None,
    ids: Tensor | None,
    rank: int,
    size: int,
) -> list[Tensor]:
    """The same from this rank's part of the inputs."""
    batch, time = tensors[0].shape[:2]
    along = [x.shape[:2] == (batch, time) for x in tensors]
    leaves = [
        (part(x, rank, size) if s else x).clone().requires_grad_()
        for x, s in zip(tensors, along, strict=True)
    ]
    first = None if state is None else state.clone().requires_grad_()
    own = None if ids is None else part(ids, rank, size)
    o, last = run(*leaves, initial_state=first, segment_ids=own)
    direction = part(weights(torch.Size((batch, time, *o.shape[2:]))), rank, size)
    loss = (o * direction).sum()
    if rank == size - 1:
        loss = loss + (last * weights(last.shape)).sum()
    loss.backward()
    for leaf, s in zip(leaves, along, strict=True):
        if not s:  # weights: each rank has a share of the gradient
            dist.all_reduce(leaf.grad)
    found = [o.detach(), *(leaf.grad for leaf in leaves)]
    if rank == size - 1:
        found += [last.detach()] + ([] if first is None else [first.grad])
    return found


def is_sequence(x: Tensor, ids: Tensor | None, o: Tensor) -> bool:
    return x.shape[:2] == o.shape[:2]


def part(x: Tensor, rank: int, size: int) -> Tensor:
    return x.unflatten(1, (size, -1))[:, rank]


@contextlib.contextmanager
def counted() -> Iterator[dict[str, int]]:
    """Bytes this rank receives from others, forward and backward, by kind of collective."""
    found = {"all_gather": 0, "reduce_scatter": 0, "all_to_all": 0, "receive": 0}
    gather, scatter, to_all = (
        collectives._all_gather,
        collectives._reduce_scatter,
        dist.all_to_all_single,
    )
    recv, rank, size = dist.recv, dist.get_rank(), dist.get_world_size()

    def all_gather(out: Tensor, x: Tensor, **options: Any) -> Any:
        found["all_gather"] += (size - 1) * x.nbytes
        return gather(out, x, **options)

    def reduce_scatter(out: Tensor, x: Tensor, **options: Any) -> Any:
        found["reduce_scatter"] += (size - 1) * out.nbytes
        return scatter(out, x, **options)

    def all_to_all(
        out: Tensor, x: Tensor, receive: list[int], send: list[int], **options: Any
    ) -> Any:
        others = sum(n for p, n in enumerate(receive) if p != rank)
        found["all_to_all"] += others * out.element_size()
        return to_all(out, x, receive, send, **options)

    def receive(out: Tensor, **options: Any) -> Any:
        found["receive"] += out.nbytes
        return recv(out, **options)

    collectives._all_gather, collectives._reduce_scatter = all_gather, reduce_scatter
    dist.all_to_all_single, dist.recv = all_to_all, receive
    try:
        yield found
    finally:
        collectives._all_gather, collectives._reduce_scatter = gather, scatter
        dist.all_to_all_single, dist.recv = to_all, recv


def bytes_of_a_layer(
    mixer: str,
    options: dict[str, Any],
    dim: int,
    length: int,
    dtype: torch.dtype,
    exchange: Exchange,
) -> dict[str, int]:
    """What one layer receives in a forward and a backward pass over `length` tokens a rank."""
    config = ModelConfig(dim=dim, num_layers=2, pattern=[mixer], mixers={mixer: options})
    chosen = make_options(mixer, options)
    layer = MIXERS[mixer](config, chosen, 0)
    with torch.no_grad():
        params = dict(layer.named_parameters())
        for name, value in initial_values(layer, 0):
            params[name].copy_(value)
    shard_sequence(layer, dist.group.WORLD, exchange)
    ids = torch.zeros(1, length, dtype=torch.long)
    ctx = SequenceContext(document_positions(ids), ids, {})
    x = torch.randn(1, length, dim).to(dtype).requires_grad_()
    with counted() as found:
        y, _ = layer(x, ctx)
        y.sum().backward()
    return found


def bytes_of_layers(
    cases: list[tuple[str, dict[str, Any]]],
    dim: int,
    lengths: list[int],
    dtype: torch.dtype,
    exchange: Exchange,
) -> list[list[dict[str, int]]]:
    return [
        [bytes_of_a_layer(*case, dim, length, dtype, exchange) for length in lengths]
        for case in cases
    ]
