"""Ranks: the process group, the device of this rank, and the device mesh."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from rondo.errors import UserError
from rondo.parallel.config import ParallelConfig

TIMEOUT = timedelta(minutes=10)
"""How long a collective waits for a missing rank before it fails."""


@dataclass(frozen=True)
class Ranks:
    """Where this process stands among the processes of a run."""

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh | None
    """Dimensions `dp_replicate` and `dp_shard`; None for a run of one process."""

    def sum(self, *values: float) -> list[float]:
        """The sums of `values` over ranks, in one collective (float64)."""
        if self.mesh is None:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return tensor.tolist()


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


def layout(config: ParallelConfig, size: int) -> tuple[int, int]:
    """`(dp_replicate, dp_shard)` for `size` ranks. Raises UserError when they do not fit."""
    replicate, shard = config.dp_replicate, config.dp_shard
    if replicate >= 1 and shard == -1:
        shard = size // replicate
    if replicate < 1 or shard < 1 or replicate * shard != size:
        raise UserError(
            f"parallel.dp_replicate, parallel.dp_shard: {config.dp_replicate} x {config.dp_shard} "
            f"does not make {size} rank(s)"
        )
    return replicate, shard


@contextmanager
def process_group(config: ParallelConfig) -> Iterator[Ranks]:
    """Joins the ranks a launcher (torchrun, srun) started; alone, starts nothing."""
    size = world_size()
    replicate, shard = layout(config, size)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        local, found = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if local >= found:
            raise UserError(
                f"rank {local} of this machine has no GPU of its own ({found} found); start at "
                "most that many ranks, or hide the GPUs with CUDA_VISIBLE_DEVICES="
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    if size == 1:
        yield Ranks(0, 1, device, None)
        return
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT
    )
    try:
        mesh = init_device_mesh(
            device.type, (replicate, shard), mesh_dim_names=("dp_replicate", "dp_shard")
        )
        yield Ranks(dist.get_rank(), size, device, mesh)
    finally:
        dist.destroy_process_group()
