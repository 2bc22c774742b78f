"""Weighted training under a layout, and what is left of it to compare with one process."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from rondo.parallel.build import ParallelModel
from rondo.parallel.config import ParallelConfig
from rondo.parallel.data_parallel import scale_gradients
from rondo.parallel.mesh import Layout, Ranks, make_mesh
from rondo.parallel.pipeline import MicroBatch
from rondo.pretrain.optim import build_optimizers
from rondo.pretrain.recipe import (
    DataConfig,
    OptimizerConfig,
    Recipe,
    ReweightConfig,
    SourceConfig,
)
from rondo.pretrain.reweight import Reweighting, SampleWeights
from rondo.tests.distributed.parity_cases import MICRO, Run, data, named

STEPS, SOURCES = 2, 3


@dataclass(frozen=True)
class Weighted:
    """What to train, and how samples count."""

    run: Run
    options: dict[str, Any]
    order: tuple[int, ...] = tuple(range(8))
    """Which rows come first, and so go to the first rank."""
    like: Layout | None = None
    """One process takes micro-batches of the rows that one of all ranks of this layout has."""


def rows(case: Weighted, layout: Layout, index: int) -> list[torch.Tensor]:
    """The rows of each micro-batch of data-parallel rank `index`."""
    parts = torch.tensor(case.order).chunk(layout.data_size)
    return list(parts[index].split(max(1, MICRO // layout.data_size)))


def micro_batches(
    case: Weighted, ranks: Ranks
) -> tuple[list[MicroBatch], list[list[int]], list[torch.Tensor]]:
    """This rank's micro-batches, the source of each of their rows (row n is of n mod 3), and which
    rows these are."""
    chosen = rows(case, ranks.layout, ranks.data_index)
    if case.like is not None:
        parts = [rows(case, case.like, index) for index in range(case.like.data_size)]
        chosen = [torch.cat(same) for same in zip(*parts, strict=True)]
    whole, cp = data(case.run), ranks.layout.cp
    batches = [
        MicroBatch(*(t[each].unflatten(1, (cp, -1))[:, ranks.index("cp")] for t in whole))
        for each in chosen
    ]
    return batches, [[int(row) % SOURCES for row in each] for each in chosen], chosen


class Recorded(SampleWeights):
    """Keeps how often each token of this rank's micro-batches counts."""

    def __call__(self, number: int, losses: torch.Tensor) -> torch.Tensor:
        self.given[number] = super().__call__(number, losses)
        return self.given[number]

    def begin(self) -> Recorded:
        self.given: dict[int, torch.Tensor] = {}
        return self


def train(case: Weighted) -> dict[str, Any]:
    """Losses, weights, what is told of them, and gradients of `STEPS` steps. Weights are by row and
    sequence-parallel rank, on the ranks that have them. Beside torchrun's variables
    for one node of four ranks stand those of two nodes of two."""
    rank, size, mesh = 0, 1, None
    if dist.is_initialized():
        rank, size = dist.get_rank(), dist.get_world_size()
        mesh = make_mesh("cpu", case.run.layout)
        os.environ |= {"LOCAL_RANK": str(rank % 2), "LOCAL_WORLD_SIZE": "2"}
        os.environ |= {"GROUP_RANK": str(rank // 2)}
    ranks = Ranks(rank, size, torch.device("cpu"), mesh)
    run, options = case.run, dict(case.options)
    parallel = ParallelConfig(pipeline_schedule=run.schedule, ep=run.ep)
    model = ParallelModel(run.config, ranks, parallel, precision="float64", seed=4, length=run.time)
    optimizers = build_optimizers(model.parts, OptimizerConfig(lr=1e-2, eps=1e-2))
    temperature = options.pop("temperature")
    sources = [SourceConfig(name) for name in "abc"]
    recipe = Recipe("x", run.config, data=DataConfig(sources), reweight=ReweightConfig(**options))
    reweighting = Reweighting(recipe, ranks)
    batches, owners, chosen = micro_batches(case, ranks)
    valid = int((data(run).targets >= 0).sum())
    result: dict[str, Any] = {"losses": [], "told": [], "weights": [], "gradients": []}
    for _ in range(STEPS):
        weights = Recorded(reweighting, temperature, batches, owners).begin()
        if recipe.reweight.scope == "global_batch":
            weights.fix(model.token_losses(batches))
        nats = model.forward_backward(batches, weights)
        result["losses"].append(ranks.sum(nats.item() * ranks.counts)[0] / valid)
        result["told"].append(weights.metrics(ranks.sum(*weights.shares()), valid))
        result["weights"].append(
            {
                (int(row), ranks.index("cp")): weight
                for number, given in weights.given.items()
                for row, weight in zip(chosen[number], given, strict=True)
            }
        )
        scale_gradients(model.parts, 1 / valid)
        result["gradients"].append(named(model, lambda param: param.grad))
        for each in optimizers:
            each.step()
            each.zero_grad()
    return result


def train_all(cases: list[Weighted]) -> list[dict[str, Any]]:
    """`train`, one case after another in the same processes."""
    return [train(case) for case in cases]


def summed(case: Weighted) -> dict[str, Any]:
    """What one process gets that computes `sum_i w_i l_i` by hand, with all rows at once."""
    ranks = Ranks(0, 1, torch.device("cpu"), None)
    run = case.run
    model = ParallelModel(
        run.config, ranks, ParallelConfig(), precision="float64", seed=4, length=run.time
    )
    batch, part = data(run), model.parts[0]
    losses = part.loss(
        batch.tokens,
        batch.targets,
        segment_ids=batch.segment_ids,
        positions=batch.positions,
        reduction="none",
    )
    tokens = (batch.targets >= 0).sum(1)
    means = losses.sum(1) / tokens
    h = 2 * (means - means.min()) / (means.max() - means.min()) - 1
    scores = (h + 1).clamp(max=1) / case.options["temperature"]
    weights = (scores.exp() * tokens / (scores.exp() * tokens).sum()).detach()
    (weights * means).sum().backward()
    return {
        "loss": float(losses.sum().detach() / tokens.sum()),
        "weighted": float((weights * means).sum().detach()),
        "gradients": named(model, lambda param: param.grad),
    }
