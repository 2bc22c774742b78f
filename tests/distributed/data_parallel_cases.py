"""What ranks run in test_data_parallel.py."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from rondo.models import ModelConfig
from rondo.parallel import data_parallel
from rondo.parallel.checkpoint import model_tensors, state_digest
from rondo.parallel.config import ParallelConfig
from rondo.parallel.mesh import Ranks
from rondo.pretrain.optim import build_optimizers
from rondo.pretrain.recipe import OptimizerConfig

CONFIG = ModelConfig(
    vocab_size=50,
    dim=32,
    num_layers=2,
    pattern=["gated_deltanet", "hgrn2"],
    mixers={"gated_deltanet": {"head_dim": 8}, "hgrn2": {"head_dim": 8}},
)


def train(layout: tuple[int, int] | None, optimizer: str, output: str) -> None:
    """Three steps of two micro-batches; rank 0 writes losses, norms and the digest."""
    rank, size, mesh = 0, 1, None
    if layout is not None:
        rank, size = dist.get_rank(), dist.get_world_size()
        mesh = init_device_mesh("cpu", layout, mesh_dim_names=("dp_replicate", "dp_shard"))
    ranks = Ranks(rank, size, torch.device("cpu"), mesh)
    model = data_parallel.build_model(CONFIG, ranks, ParallelConfig(), precision="float32", seed=4)
    start = state_digest({"model": model_tensors(model)})
    optimizers = build_optimizers(model, OptimizerConfig(name=optimizer, lr=0.01))
    tokens = torch.randint(0, 50, (8, 33), generator=torch.Generator().manual_seed(1))
    rows = []
    for _ in range(3):
        total = 0.0
        parts = tokens.chunk(size)[rank].chunk(2)
        for i, part in enumerate(parts):
            data_parallel.accumulate(model, last=i == 1)
            loss = model.loss(part[:, :-1], part[:, 1:])
            loss.backward()
            total += loss.item()
        data_parallel.finish_gradients(model, ranks)
        data_parallel.scale_gradients(model, 1 / 256)
        rows.append((ranks.sum(total)[0] / 256, data_parallel.gradient_norm(model, ranks)))
        for each in optimizers:
            each.step()
            each.zero_grad()
    if rank == 0:
        Path(output).write_text(json.dumps({"start": start, "rows": rows}))


def norm_with_one_bad_rank() -> float:
    """The gradient norm when rank 1 alone has a gradient that is not finite."""
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp_replicate", "dp_shard"))
    ranks = Ranks(dist.get_rank(), 2, torch.device("cpu"), mesh)
    model = data_parallel.build_model(CONFIG, ranks, ParallelConfig(), precision="float32", seed=4)
    tokens = torch.zeros(1, 9, dtype=torch.long)
    loss = model.loss(tokens[:, :-1], tokens[:, 1:])
    (loss * float("inf") if ranks.rank == 1 else loss).backward()
    data_parallel.finish_gradients(model, ranks)
    return data_parallel.gradient_norm(model, ranks)
