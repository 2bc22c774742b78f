"""Ranks: the process group, the device of this rank, and the device mesh."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from rondo.errors import UserError
from rondo.parallel.config import ParallelConfig

TIMEOUT = timedelta(minutes=10)
"""How long a collective waits for a missing rank before it fails."""
SHARDED, DATA, EXPERT, EXPERT_SHARD = "sharded", "data", "expert", "expert_shard"
"""Joint dimensions: `dp_shard` and `cp`, over which parameters are sharded; these and
`dp_replicate`, over which gradients add up. Ranks with different experts, and those that shard the
same ones."""


class Layout(NamedTuple):
    """Sizes of the mesh's dimensions, slowest first: neighbours in `tp` talk the most."""

    pp: int = 1
    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    tp: int = 1

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self.pp * self.data_size * self.cp * self.tp

    @property
    def data_size(self) -> int:
        """Ranks that read different sequences."""
        return self.dp_replicate * self.dp_shard


@dataclass(frozen=True)
class Ranks:
    """Where this process stands among the processes of a run."""

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh | None
    """Dimensions as in `Layout`, and the joint ones; None for a run of one process."""

    @property
    def layout(self) -> Layout:
        """Sizes of the mesh."""
        return Layout() if self.mesh is None else Layout(*self.mesh.shape)

    def index(self, name: str) -> int:
        """This rank's place along a dimension of the mesh."""
        return 0 if self.mesh is None else self.mesh.get_local_rank(name)

    def group(self, name: str) -> dist.ProcessGroup:
        """The ranks that differ from this one along a dimension, or a joint one, only."""
        assert self.mesh is not None, "a single process has no groups"
        return submesh(self.mesh, name).get_group()

    @property
    def data_index(self) -> int:
        """Which of the `layout.data_size` shares of the sequences this rank reads."""
        return self.index("dp_replicate") * self.layout.dp_shard + self.index("dp_shard")

    @property
    def counts(self) -> bool:
        """Whether this rank's losses enter global sums: tensor-parallel ranks all see the same,
        and only the end of a pipeline sees any."""
        return self.index("tp") == 0 and self.index("pp") == self.layout.pp - 1

    def sum(self, *values: float) -> list[float]:
        """The sums of `values` over all ranks, in one collective (float64)."""
        if self.mesh is None:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return tensor.tolist()

    def largest(self, values: torch.Tensor) -> torch.Tensor:
        """The largest of each of `values` over all ranks, in one collective; no number counts as
        infinite."""
        found = torch.nan_to_num(values, nan=torch.inf, posinf=torch.inf)
        if self.mesh is not None:
            dist.all_reduce(found, dist.ReduceOp.MAX)
        return found


def make_mesh(device_type: str, layout: Layout) -> DeviceMesh:
    """The device mesh of a layout, with its joint dimensions. Collective."""
    mesh = init_device_mesh(device_type, tuple(layout), mesh_dim_names=Layout._fields)
    submesh(mesh, "dp_shard", "cp")._flatten(SHARDED)
    submesh(mesh, "dp_replicate", "dp_shard", "cp")._flatten(DATA)
    return mesh


def submesh(mesh: DeviceMesh, *names: str) -> DeviceMesh:
    """Dimensions of a mesh, joint ones included."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Slicing a flattened dim")
        return mesh[names if len(names) > 1 else names[0]]


def world_size() -> int:
    """Ranks of this run, as the launcher's environment says. Raises UserError under an srun that
    started several tasks without saying where they meet: each would train alone."""
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
    if "WORLD_SIZE" not in os.environ and int(tasks) > 1:
        raise UserError(
            f"srun started {tasks} tasks, but WORLD_SIZE is not set; let each task start torchrun, "
            "or export RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT"
        )
    return int(os.environ.get("WORLD_SIZE", "1"))


def layout(config: ParallelConfig, size: int) -> Layout:
    """The layout of `size` ranks. Raises UserError when they do not fit."""
    given = (config.pp, config.dp_replicate, config.dp_shard, config.cp, config.tp)
    fixed = config.pp * config.dp_replicate * config.cp * config.tp
    shard = size // fixed if config.dp_shard == -1 and fixed > 0 else config.dp_shard
    found = Layout(config.pp, config.dp_replicate, shard, config.cp, config.tp)
    if min(found) < 1 or found.size != size:
        raise UserError(
            f"parallel.{', parallel.'.join(Layout._fields)}: {' x '.join(map(str, given))} "
            f"does not make {size} rank(s)"
        )
    return found


def rank_device() -> torch.device:
    """Where this rank computes: its own GPU if the machine has any, else the CPU. Raises UserError
    where other ranks have them all."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local, found = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local >= found:
        raise UserError(
            f"rank {local} of this machine has no GPU of its own ({found} found); start at "
            "most that many ranks, or hide the GPUs with CUDA_VISIBLE_DEVICES="
        )
    return torch.device("cuda", local)


@contextmanager
def process_group(config: ParallelConfig) -> Iterator[Ranks]:
    """Joins the ranks a launcher (torchrun, srun) started; alone, starts nothing."""
    size = world_size()
    shape = layout(config, size)
    device = rank_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if size == 1 and config.engine != "deepspeed":
        yield Ranks(0, 1, device, None)
        return
    # DeepSpeed wants a group, even of one process that no launcher started.
    alone: dict[str, Any] = (
        {"store": dist.HashStore(), "rank": 0, "world_size": 1} if size == 1 else {}
    )
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT, **alone
    )
    try:
        yield Ranks(dist.get_rank(), size, device, make_mesh(device.type, shape))
    finally:
        dist.destroy_process_group()
