"""Copies of tensors that a background writer can take its time with, and the writer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor
from torch.futures import Future

from rondo.models.loading import OFFSETS_KEY, SLICES_KEY
from rondo.parallel.checkpoint.collective import CheckpointError
from rondo.parallel.checkpoint.files import sync

Tensors = Mapping[str, Mapping[str, Tensor]]
"""Tensors (plain, equal on all ranks, or DTensors) by name, by part of the checkpoint."""


@dataclass(frozen=True)
class StagedTensor:
    """This rank's slice of a tensor, dense and on the CPU, as torch.distributed.checkpoint takes
    it: whatever has `__create_write_items__` says itself what is to be written."""

    local: Tensor
    shape: torch.Size
    offsets: torch.Size

    def __create_write_items__(self, fqn: str, _: Any) -> list[WriteItem]:
        chunk = ChunkStorageMetadata(offsets=self.offsets, sizes=self.local.shape)
        data = TensorWriteData(chunk, TensorProperties.create_from_tensor(self.local), self.shape)
        return [WriteItem(MetadataIndex(fqn, self.offsets), WriteItemType.SHARD, tensor_data=data)]


class Staging:
    """Copies tensors to host memory, into the same buffers each time.

    Args:
        keep: hold on to the buffers between calls; costs memory, saves allocating them anew.
    """

    def __init__(self, *, keep: bool) -> None:
        self._keep = keep
        self._buffers: dict[tuple[str, str], Tensor] = {}

    @torch.no_grad()
    def stage(self, tensors: Tensors) -> dict[str, dict[str, StagedTensor]]:
        """Copies this rank's share of `tensors`; their owners may change them on return.

        What the call before returned is overwritten.
        """
        staged: dict[str, dict[str, StagedTensor]] = {part: {} for part in tensors}
        buffers, devices = {}, set()
        for part, by_name in tensors.items():
            for name, tensor in by_name.items():
                if not isinstance(tensor, Tensor):
                    raise CheckpointError(f"{part}: {name} is a {type(tensor)}, expected a Tensor")
                local, offsets = tensor, torch.Size([0] * tensor.ndim)
                if isinstance(tensor, DTensor):
                    if tensor.device_mesh.get_coordinate() is None:
                        continue  # this rank has no part of it
                    local, offsets = tensor.to_local(), tensor.__create_chunk_list__()[0].offsets
                buffer = self._buffer((part, name), local)
                buffer.copy_(local, non_blocking=True)
                buffers[part, name] = buffer
                devices.add(local.device)
                staged[part][name] = StagedTensor(buffer, tensor.shape, offsets)
        for device in devices:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        if self._keep:
            self._buffers = buffers
        return staged

    def _buffer(self, key: tuple[str, str], like: Tensor) -> Tensor:
        buffer = self._buffers.get(key)
        if buffer is None or buffer.shape != like.shape or buffer.dtype != like.dtype:
            buffer = torch.empty(like.shape, dtype=like.dtype, pin_memory=like.is_cuda)
        return buffer


class StagedPlanner(DefaultSavePlanner):
    """Plans the saving of a flat mapping of `StagedTensor`."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self.state_dict[index.fqn].local


class StreamingWriter(HuggingFaceStorageWriter):
    """The distributed safetensors writer of torch.distributed.checkpoint, one file a rank.

    Its stock `write_data` first builds the whole file in memory while it holds the interpreter
    lock (1.7 s for 512 MB), which stops training; this one streams from the tensors.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(str(path), save_distributed=True)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        written: Future[list[WriteResult]] = Future()
        if not plan.items:
            written.set_result([])
            return written
        tensors, offsets = {}, {}
        for item in plan.items:
            tensors[item.index.fqn] = planner.resolve_data(item)
            offsets[item.index.fqn] = {OFFSETS_KEY: list(item.index.offset or ())}
        file = Path(self.path) / shard_name(plan.storage_data["shard_index"])
        metadata = {SLICES_KEY: json.dumps(offsets), "DCP_VERSION": "1.0", "format": "pt"}
        save_file(tensors, file, metadata=metadata)
        sync(file)
        written.set_result(
            [WriteResult(i.index, tensors[i.index.fqn].nbytes, file.name) for i in plan.items]
        )
        return written


def shard_name(index: int) -> str:
    """Name of the file of rank `index - 1`."""
    return f"shard-{index:05d}.safetensors"
