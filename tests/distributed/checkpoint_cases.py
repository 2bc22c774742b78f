"""What ranks run in the tests of checkpoints: a small sharded model with two optimizers."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from rondo.errors import UserError
from rondo.parallel.checkpoint import (
    Checkpointer,
    CheckpointError,
    model_tensors,
    optimizer_tensors,
    staging,
    state_digest,
)
from rondo.pretrain.data import Seen
from rondo.pretrain.run_data import require_same_seen

Tensors = dict[str, dict[str, Tensor]]


class Small(nn.Module):
    """Embedding, two matrices whose rows 2, 3 and 4 ranks do not divide evenly, and a vector and
    a scalar buffer that stay whole on every rank."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.up = nn.Linear(6, 9)
        self.down = nn.Linear(9, 3, bias=False)
        self.gain = nn.Parameter(torch.randn(9))
        self.register_buffer("count", torch.tensor(7))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(self.embed(tokens))) * self.gain)


class Run:
    """A model that has trained for some steps, sharded if there is a process group: over all
    ranks, or over each of `replicas` groups of them."""

    def __init__(self, seed: int, steps: int = 0, replicas: int = 1) -> None:
        torch.manual_seed(seed)
        self.model = Small()
        if dist.is_initialized():
            shape = (replicas, dist.get_world_size() // replicas)
            mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))
            fully_shard(self.model, mesh=mesh, ignored_params={self.model.gain})
        matrices = [self.model.up.weight, self.model.down.weight]
        rest = [p for p in self.model.parameters() if all(p is not m for m in matrices)]
        self.optimizers = [
            torch.optim.AdamW(rest, lr=1e-2),
            torch.optim.Muon(matrices, lr=1e-2),
        ]
        self.train(steps)

    def train(self, steps: int) -> None:
        for _ in range(steps):
            self.model(torch.arange(8)).square().sum().backward()
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad()

    @property
    def tensors(self) -> Tensors:
        return {
            "model": model_tensors([self.model]),
            "optimizer": optimizer_tensors([self.model], self.optimizers),
        }


def change(tensors: Tensors) -> None:
    """Overwrites every tensor in place."""
    with torch.no_grad():
        for by_name in tensors.values():
            for tensor in by_name.values():
                local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
                local.fill_(-5)


def save(folder: Path, seed: int, steps: list[int]) -> list[str]:
    """Saves at each of `steps`, changing the tensors right after; the digests that were saved."""
    run = Run(seed, steps=2)
    checkpointer = Checkpointer(folder, keep=0)
    digests = []
    for step in steps:
        with torch.no_grad():
            run.model.embed.weight.add_(step)
        before = {p: {n: t.detach().clone() for n, t in g.items()} for p, g in run.tensors.items()}
        digests.append(state_digest(run.tensors))
        checkpointer.save(step, run.tensors, {"step": step, "loss": 0.1 + step / 3})
        change(run.tensors)
        checkpointer.wait()
        with torch.no_grad():
            for part, by_name in run.tensors.items():
                for name, tensor in by_name.items():
                    tensor.copy_(before[part][name])
    checkpointer.close()
    return digests


def load_and_save(
    sources: list[Path], target: Path | None, replicas: int = 1
) -> list[tuple[str, str, float]]:
    """Loads the newest checkpoint of each folder into another model and saves it to `target`;
    gives name, digest and a saved number of each."""
    results = []
    for source in sources:
        run = Run(seed=99, replicas=replicas)
        checkpointer = Checkpointer(source, keep=0)
        path = checkpointer.newest()
        if path is None:
            raise RuntimeError(f"no checkpoint in {source}")
        state = checkpointer.load(path, run.tensors)
        results.append((path.name, state_digest(run.tensors), state["loss"]))
        checkpointer.close()
        if target is not None:
            writer = Checkpointer(target, keep=0, asynchronous=False)
            writer.save(state["step"], run.tensors, state)
            writer.close()
    return results


def failing_write(folder: Path) -> list[Any]:
    """Rank 1's disk is full for one save: messages of both ways to hear of it, and the steps on
    disk after it and after the next save."""
    run = Run(seed=1, steps=1)
    checkpointer = Checkpointer(folder, keep=0)
    checkpointer.save(1, run.tensors, {})
    checkpointer.wait()
    original = staging.save_file
    if dist.get_rank() == 1:

        def full(*args: Any, **kwargs: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        staging.save_file = full
    messages = []
    checkpointer.save(2, run.tensors, {})
    try:
        checkpointer.wait()
    except CheckpointError as error:
        messages.append(str(error))
    checkpointer.save(3, run.tensors, {})
    try:
        while True:
            checkpointer.check()
    except CheckpointError as error:
        messages.append(str(error))
    staging.save_file = original
    after = sorted(path.name for path in folder.iterdir())
    dist.barrier()  # nobody begins the next save before all have looked
    checkpointer.save(4, run.tensors, {})
    checkpointer.close()
    return [messages, after, sorted(path.name for path in folder.iterdir())]


def none_valid(folder: Path) -> str:
    """Message of looking for the newest valid checkpoint where all are damaged."""
    try:
        return f"found {Checkpointer(folder, keep=0).newest()}"
    except CheckpointError as error:
        return str(error)


def wrong_model(folder: Path) -> str:
    """Message of loading a checkpoint into a model with one other shape on every rank, and
    whether nothing was touched."""
    run = Run(seed=3)
    tensors = run.tensors
    before = state_digest(tensors)
    tensors["model"]["gain"] = torch.zeros(4)
    checkpointer = Checkpointer(folder, keep=0)
    try:
        checkpointer.load(checkpointer.newest(), tensors)
    except CheckpointError as error:
        return f"{error} untouched={state_digest(run.tensors) == before}"
    return "loaded"


def another_has_saved(folder: Path) -> tuple[Path, str]:
    """Which checkpoint of another run ranks take that find different ones, and what they say where
    they have read different records of what it had seen."""
    rank = dist.get_rank()
    checkpointer = Checkpointer(folder, keep=0)
    found = checkpointer.found(lambda: folder / f"step-{rank}")
    key = ("second", "runs/other")
    require_same_seen({key: Seen("runs/other", {"step": 7})})
    try:
        require_same_seen({key: Seen("runs/other", {"step": 7 + rank})})
    except UserError as error:
        return found, str(error)
    return found, "went on"


def in_turn(*calls: tuple[Callable[..., Any], tuple[Any, ...]]) -> list[Any]:
    """Several of the above on the same processes, which take seconds to start."""
    return [function(*args) for function, args in calls]
