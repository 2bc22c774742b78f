"""What ZeRO 3 needs to keep parameters and optimizer state on a disk (arXiv 2104.07857)."""

from __future__ import annotations

import math
import resource
from pathlib import Path

from deepspeed.ops.op_builder import AsyncIOBuilder

from rondo.errors import UserError
from rondo.models import Decoder
from rondo.parallel.config import DeepSpeedOptions

_LEAST_ON_DISK = 2**20
"""Bytes of a share; DeepSpeed keeps smaller ones in memory."""
_ADAMW_BUFFERS = 4
"""Of a share: parameters, gradients and two moments."""
_MAY_LOCK = 14
"""The bit of the capability CAP_IPC_LOCK, with which no limit holds."""


def check_reader(options: DeepSpeedOptions) -> None:
    """Raises UserError where something is to be kept on a disk that DeepSpeed cannot read from."""
    places = {key: getattr(options, key) for key in ("offload_optimizer", "offload_parameters")}
    on_disk = next((key for key, place in places.items() if place == "nvme"), None)
    if on_disk is not None and not AsyncIOBuilder().is_compatible(verbose=False):
        raise UserError(
            f"parallel.deepspeed.{on_disk}: nvme needs libaio and its headers to compile "
            "DeepSpeed's async_io (apt-get install libaio-dev); or take cpu"
        )


def read_buffers(part: Decoder, ranks: int) -> dict[str, int]:
    """Buffers, in elements, for parameters that come from a disk: for the largest share, and as
    many as a block and what is outside the blocks have shares that DeepSpeed puts there."""
    shares = {name: -(-param.numel() // ranks) for name, param in part.named_parameters()}
    places = [
        name.split(".")[1] if name.startswith("blocks.") else None
        for name, share in shares.items()
        if share * 4 >= _LEAST_ON_DISK
    ]
    count = places.count(None) + max(places.count(block) for block in part.blocks)
    return {"buffer_count": max(1, count), "buffer_size": max(shares.values())}


def check_locked_memory(part: Decoder, ranks: int, options: DeepSpeedOptions) -> None:
    """Raises UserError where a rank may not lock the memory that it reads into: DeepSpeed's reader
    would abort."""
    need = 0
    if options.offload_parameters == "nvme":
        need += 4 * math.prod(read_buffers(part, ranks).values())
    if options.offload_optimizer == "nvme":
        trained = sum(param.numel() for param in part.parameters() if param.requires_grad)
        need += 4 * _ADAMW_BUFFERS * trained // ranks
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if limit != resource.RLIM_INFINITY and need > limit and not _may_lock():
        raise UserError(
            f"parallel.deepspeed: nvme locks {need:,} bytes of memory a rank or more, but its "
            f"limit is {limit:,}; raise it (ulimit -l unlimited), or take cpu"
        )


def _may_lock() -> bool:
    status = Path("/proc/self/status").read_text("utf-8")
    return bool(int(status.partition("CapEff:")[2].split()[0], 16) >> _MAY_LOCK & 1)
