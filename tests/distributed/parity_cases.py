"""Training under a layout, and what is left of it to compare with one process."""

from __future__ import annotations

import dataclasses
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from rondo.kernels.nonlinear_rnn import lstm_library
from rondo.kernels.segments import document_positions
from rondo.models import ModelConfig
from rondo.models.ffn.dispatch import Choice, over_capacity
from rondo.models.ffn.moe import mixture_layers
from rondo.parallel.bounds import keep_bounds
from rondo.parallel.build import ParallelModel
from rondo.parallel.config import Engine, ParallelConfig
from rondo.parallel.data_parallel import scale_gradients
from rondo.parallel.load import load_summary, move_biases, take_loads
from rondo.parallel.mesh import Layout, Ranks, make_mesh
from rondo.parallel.pipeline import MicroBatch
from rondo.parallel.sequence import over_ranks
from rondo.pretrain.domain_loads import DomainLoads
from rondo.pretrain.optim import build_optimizers
from rondo.pretrain.recipe import OptimizerConfig
from rondo.pretrain.routing import expert_similarity, router_gradients, routing
from rondo.tests.toys import registered

VOCAB, ROWS, TIME, MICRO, STEPS = 50, 8, 24, 4, 2


@dataclasses.dataclass(frozen=True)
class Run:
    """What to train, and how."""

    config: ModelConfig
    layout: Layout
    schedule: str = "1f1b"
    precision: str = "float64"
    checkpointing: str = "none"
    exchange: str = "all_gather"
    ep: int = 1
    compile: bool = False
    rows: int = ROWS
    time: int = TIME
    packed: bool = True
    engine: Engine = "native"


def data(run: Run) -> MicroBatch:
    """All rows: documents of odd lengths, across every border between ranks, and beginning
    exactly at some; the first row is one document, the second has many short ones."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, VOCAB, (run.rows, run.time + 1), generator=generator)
    starts = torch.zeros(run.rows, run.time, dtype=torch.long)
    starts[1, [1, 2, run.time - 3, run.time - 1]] = 1
    starts[1, run.time // 2] = 1
    starts[2:, run.time // 2] = 1
    starts[3:, [1, run.time // 4 + 1, run.time - 1]] = 1
    starts[4:, run.time // 4] = 1
    if not run.packed:
        starts.zero_()
    ids = starts.cumsum(1)
    targets = tokens[:, 1:].clone()
    targets[:, :-1][ids[:, 1:] != ids[:, :-1]] = -100
    return MicroBatch(tokens[:, :-1], targets, ids, document_positions(ids))


def micro_batches(run: Run, ranks: Ranks) -> list[MicroBatch]:
    """This rank's share of the rows and of the time."""
    layout = run.layout
    parts = []
    for tensor in data(run):
        rows = tensor.chunk(layout.data_size)[ranks.data_index]
        rows = rows.unflatten(1, (layout.cp, -1))[:, ranks.index("cp")]
        parts.append(rows.split(max(1, MICRO // layout.data_size)))
    return [MicroBatch(*tensors) for tensors in zip(*parts, strict=True)]


def domains(run: Run, ranks: Ranks) -> list[list[int]]:
    """Domains of this rank's rows, by micro-batch: 0 and 1 in turns over all rows."""
    own = (torch.arange(run.rows) % 2).chunk(run.layout.data_size)[ranks.data_index]
    return [part.tolist() for part in own.split(max(1, MICRO // run.layout.data_size))]


def train(run: Run) -> dict[str, Any]:
    """`train_one`, with the toys of tests/toys.py known."""
    with registered():
        return train_one(run)


def train_one(run: Run) -> dict[str, Any]:
    """Losses, gradients of the first step, gradient norms, similarities of experts, their
    loads by domain, shares of dropped choices and largest loads, auxiliary losses, how sure their
    routers are and the norms of their gradients, and parameters and biases of the choice of
    experts after `STEPS` steps, by name and whole; of a pipeline this rank's names."""
    rank, size, mesh = 0, 1, None
    if dist.is_initialized():
        rank, size = dist.get_rank(), dist.get_world_size()
        mesh = make_mesh("cpu", run.layout)
    ranks = Ranks(rank, size, torch.device("cpu"), mesh)
    parallel = ParallelConfig(
        pipeline_schedule=run.schedule,
        activation_checkpointing=run.checkpointing,
        cp_exchange=run.exchange,
        ep=run.ep,
        engine=run.engine,
    )
    model = ParallelModel(
        run.config,
        ranks,
        parallel,
        precision=run.precision,
        seed=4,
        length=run.time,
        compile=run.compile,
    )
    optimizers = build_optimizers(model.parts, OptimizerConfig(lr=1e-4, eps=1e-2))
    batches = micro_batches(run, ranks)
    valid = int((data(run).targets >= 0).sum())
    result: dict[str, Any] = {"losses": [], "norms": [], "gradients": {}, "loads": []}
    result |= {"auxiliary": [], "routing": []}
    for step in range(STEPS):
        nats = model.forward_backward(batches)
        result["losses"].append(ranks.sum(nats.item() * ranks.counts)[0] / valid)
        auxiliary = [value.item() for _, value in sorted(model.auxiliary.items())]
        result["auxiliary"] += ranks.sum(*auxiliary)
        scale_gradients(model.parts, 1 / valid)
        result["norms"].append(model.gradient_norm())
        if step == 0:
            result["gradients"] = named(model, lambda param: param.grad)
        for each in optimizers:
            each.step()
            each.zero_grad()
        keep_bounds(model.parts)
        loads = take_loads(model.parts, ranks)
        result["loads"].append([*load_summary(loads).values()])
        move_biases(model.parts, loads)
    if mixture_layers(run.config) and not run.compile:
        with DomainLoads(model, domains(run, ranks), ["even", "odd"]) as by_domain:
            nats = model.evaluate(batches)
        result["domains"] = by_domain.tables()
        decided = sorted(routing(model, batches).items())
        # The inner balance is a median of a rank's micro-batch.
        result["routing"] = [value for name, value in decided if "router_inner" not in name]
        result["routing"] += router_gradients(model, batches, valid).values()
    else:
        nats = model.evaluate(batches)
    result["evaluated"] = ranks.sum(nats.item() * ranks.counts)[0] / valid
    result["similarity"] = list(expert_similarity(model).values())
    result["parameters"] = named(model, lambda param: param.detach())
    for part in model.parts:
        buffers = dict(part.named_buffers())
        biases = {name: buffers[name] for name in part.optional_names() & buffers.keys()}
        result["parameters"] |= {name: bias.numpy().copy() for name, bias in biases.items()}
    return result


def named(model: ParallelModel, value: Any) -> dict[str, np.ndarray]:
    """`value` of every parameter of this rank, whole."""
    found = {}
    for part in model.parts:
        for name, param in part.named_parameters():
            tensor = value(param)
            if tensor is None:  # frozen
                continue
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            found[name] = whole.numpy().copy()  # tensors in a pipe need the sender to stay alive
    return found


def train_all(runs: list[Run]) -> list[dict[str, Any]]:
    """`train`, one run after another in the same processes."""
    return [train(run) for run in runs]


def train_by_library(runs: list[Run]) -> list[dict[str, Any]]:
    """`train_all`, and of each run how often an LSTM went to torch's own layer, `"calls"`."""
    found = []
    for run in runs:
        with patch.object(lstm_library, "lstm", wraps=lstm_library.lstm) as called:
            found.append({**train(run), "calls": called.call_count})
    return found


def dropped_by_rank(*choice: np.ndarray) -> np.ndarray:
    """What each rank drops of a `Choice` in its stretch of the sequences, of 4 experts that take
    0.7 of their even share."""
    rank, size = dist.get_rank(), dist.get_world_size()
    group = dist.group.WORLD
    assert group is not None
    own = [torch.from_numpy(each).chunk(size, 1)[rank] for each in choice]
    return over_ranks(over_capacity, group)(Choice(*own), 4, 0.7).numpy()
