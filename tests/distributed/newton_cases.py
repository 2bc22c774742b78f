"""What ranks run in test_newton_over_ranks.py."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rondo.kernels import newton_rnn
from rondo.kernels.newton_rnn import chunked
from rondo.models import Decoder, ModelConfig
from rondo.parallel import newton
from rondo.parallel.counts import take_gauges
from rondo.parallel.mesh import Layout, Ranks, make_mesh
from rondo.parallel.sequence import over_ranks
from rondo.tests.distributed.sequence_cases import part, weights
from rondo.tests.kernels.newton_rnn_cases import BATCH, operands

CHUNK = 3
FAILING: dict[str, Any] = {"max_iterations": 1, "iterations": 0}


def newton_over_ranks(lengths: list[int]) -> dict[str, float]:
    """Largest difference to the whole sequence in one process, by case."""
    chunked.chunk_size = lambda *_: CHUNK  # of this process alone
    worst = {}
    for name in ("para_gru", "para_lstm"):
        for time in lengths:
            for case in ("plain", "documents", "state", "documents, state", "fails"):
                worst[f"{name}, {time} tokens a rank, {case}"] = _difference(name, time, case)
    return worst


def exchanges(time: int) -> tuple[int, int, int]:
    """Iterations of a solve over ranks, and the exchanges of summaries forward and backward."""
    count, exchange = 0, newton.RankNeighbours._exchange

    def counted(self: Any, summary: Any) -> Any:
        nonlocal count
        count += 1
        return exchange(self, summary)

    newton.RankNeighbours._exchange = counted
    gates, recurrent, bias, _ = operands("para_lstm", time * dist.get_world_size())
    gates = part(gates, dist.get_rank(), dist.get_world_size()).requires_grad_()
    found = over_ranks(newton_rnn, dist.group.WORLD)("para_lstm", gates, recurrent, bias=bias)
    forward, count = count, 0
    found.h.sum().backward()
    newton.RankNeighbours._exchange = exchange
    return int(found.health.iterations), forward, count


def not_a_number() -> tuple[int, bool, float]:
    """Fallbacks, whether outputs say so, and the count of layers in the metrics, where one rank
    alone has an input that is none."""
    rank, size = dist.get_rank(), dist.get_world_size()
    gates, recurrent, _, _ = operands("para_gru", 4 * size)
    gates = part(gates, rank, size)
    if rank == 0:
        gates[0, -1] = torch.nan
    found = over_ranks(newton_rnn, dist.group.WORLD)("para_gru", gates, recurrent)
    config = ModelConfig(vocab_size=4, dim=16, num_layers=1, pattern=["para_gru"])
    model = Decoder(config, seed=0)
    model.blocks["0"].mixer.observe(found.health)
    mesh = make_mesh("cpu", Layout(cp=size))
    counted = take_gauges([model], Ranks(rank, size, torch.device("cpu"), mesh))
    said = bool(found.h[0, -1].isnan().all())
    return int(found.health.sequential), said, counted["newton/fallbacks"]


def _documents(time: int, size: int) -> Tensor:
    """A document over all ranks, and one that begins exactly at every border."""
    starts = torch.zeros(BATCH, time * size, dtype=torch.long)
    starts[1, ::time] = 1
    starts[1, -1] = 1
    return starts.cumsum(1) + 70_000


def _difference(name: str, time: int, case: str) -> float:
    rank, size = dist.get_rank(), dist.get_world_size()
    inputs = operands(name, time * size, scale=6.0 if case == "fails" else 0.4)
    ids = _documents(time, size) if "documents" in case else None
    options: dict[str, Any] = FAILING if case == "fails" else {}
    given = inputs if "state" in case else inputs[:3]
    whole = [x.clone().requires_grad_() for x in given]
    expected = _run(newton_rnn, name, whole, ids, {})
    _loss(expected, expected.h.shape, 0, 1, True).backward()
    mine = [part(given[0], rank, size), *given[1:]]
    leaves = [x.clone().requires_grad_() for x in mine]
    mine_ids = None if ids is None else part(ids, rank, size)
    found = _run(over_ranks(newton_rnn, dist.group.WORLD), name, leaves, mine_ids, options)
    last = rank == size - 1
    _loss(found, expected.h.shape, rank, size, last).backward()
    for x in leaves[1:3]:  # each rank has a share of the gradient
        dist.all_reduce(x.grad)
    if case == "fails" and size * time > CHUNK * 2 and not int(found.health.sequential):
        return torch.inf  # it was to fail
    pairs = [
        (found.h, part(expected.h, rank, size)),
        (leaves[0].grad, part(whole[0].grad, rank, size)),
        *((a.grad, b.grad) for a, b in zip(leaves[1:3], whole[1:3], strict=True)),
    ]
    if last:
        pairs.append((found.state, expected.state))
        pairs += [(a.grad, b.grad) for a, b in zip(leaves[3:], whole[3:], strict=True)]
    return max(float((a - b).abs().max()) for a, b in pairs)


def _run(operator: Any, name: str, leaves: list[Tensor], ids: Any, options: Any) -> Any:
    state = leaves[3] if len(leaves) > 3 else None
    return operator(
        name, *leaves[:2], bias=leaves[2], initial_state=state, segment_ids=ids, **options
    )


def _loss(found: Any, shape: torch.Size, rank: int, size: int, last: bool) -> Tensor:
    loss = (found.h * part(weights(shape), rank, size)).sum()
    return loss + (found.state * weights(found.state.shape)).sum() if last else loss
