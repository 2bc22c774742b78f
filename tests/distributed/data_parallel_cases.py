"""What ranks run in test_data_parallel.py."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.distributed as dist

from rondo.models import ModelConfig
from rondo.parallel import data_parallel
from rondo.parallel.build import ParallelModel
from rondo.parallel.checkpoint import model_tensors, state_digest
from rondo.parallel.config import ParallelConfig
from rondo.parallel.mesh import Layout, Ranks, make_mesh
from rondo.parallel.pipeline import MicroBatch
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
        mesh = make_mesh("cpu", Layout(1, *layout))
    ranks = Ranks(rank, size, torch.device("cpu"), mesh)
    model = build(ranks)
    start = state_digest({"model": model_tensors(model.parts)})
    optimizers = build_optimizers(model.parts, OptimizerConfig(name=optimizer, lr=0.01))
    tokens = torch.randint(0, 50, (8, 33), generator=torch.Generator().manual_seed(1))
    rows = []
    for _ in range(3):
        batches = [micro_batch(part) for part in tokens.chunk(size)[rank].chunk(2)]
        total = model.forward_backward(batches).item()
        data_parallel.scale_gradients(model.parts, 1 / 256)
        rows.append((ranks.sum(total)[0] / 256, model.gradient_norm()))
        for each in optimizers:
            each.step()
            each.zero_grad()
    if rank == 0:
        Path(output).write_text(json.dumps({"start": start, "rows": rows}))


def norm_with_one_bad_rank() -> float:
    """The gradient norm when rank 1 alone has a gradient that is not finite."""
    ranks = Ranks(dist.get_rank(), 2, torch.device("cpu"), make_mesh("cpu", Layout(dp_shard=2)))
    model = build(ranks)
    [part] = model.parts
    tokens = torch.zeros(1, 9, dtype=torch.long)
    loss = part.loss(tokens[:, :-1], tokens[:, 1:])
    (loss * float("inf") if ranks.rank == 1 else loss).backward()
    data_parallel.finish_gradients(model.parts, ranks)
    return model.gradient_norm()


def build(ranks: Ranks) -> ParallelModel:
    return ParallelModel(CONFIG, ranks, ParallelConfig(), precision="float32", seed=4, length=32)


def micro_batch(rows: torch.Tensor) -> MicroBatch:
    """Rows that are one document each."""
    tokens, targets = rows[:, :-1], rows[:, 1:]
    positions = torch.arange(tokens.shape[1]).expand(tokens.shape)
    return MicroBatch(tokens, targets, torch.zeros_like(tokens), positions)
