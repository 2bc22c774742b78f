"""What a rank allocates and sends, seen at torch's dispatcher; for fake and for real tensors."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# c10d operators by the name the table shows. Functional ones (DTensor's) and FSDP2's come here too.
_NAMES = {
    "_allgather_base_": "all-gather",
    "all_gather_into_tensor": "all-gather",
    "all_gather_into_tensor_out": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "reduce_scatter_tensor": "reduce-scatter",
    "allreduce_": "all-reduce",
    "all_reduce": "all-reduce",
    "all_reduce_": "all-reduce",
    "alltoall_base_": "all-to-all",
    "all_to_all_single": "all-to-all",
    "recv_": "send/receive",
}
_UNCOUNTED = ("send", "wait_tensor")  # the other side of a receive; no traffic of its own


class Collective(NamedTuple):
    """A kind of collective."""

    name: str
    along: str
    """The dimensions of the mesh that its ranks differ in, as in "dp_shard x cp"."""
    purpose: str
    """What it is for: parameters, gradients (FSDP2's, and those summed after the last micro-batch),
    activations, or optimizer."""


class Traffic(NamedTuple):
    """How often, and how much a rank receives (and sends as much), in bytes."""

    count: float = 0
    bytes: float = 0

    def plus(self, other: Traffic, weight: float = 1) -> Traffic:
        """This and `weight` times `other`."""
        return Traffic(self.count + weight * other.count, self.bytes + weight * other.bytes)


class Recorder(TorchDispatchMode):
    """Counts collectives and follows the memory of all tensors made while it is active.

    `traffic`: by kind. `peak`: most bytes alive at once, and `peak_buffers`, how much of it went
    through collectives or holds gathered parameters. `dimensions`: those of each process group, by
    its name. `known`: tensors that were there before.
    """

    def __init__(self, dimensions: dict[str, str], known: Iterable[Tensor]) -> None:
        super().__init__()
        self.dimensions = dimensions
        self._known = _storages(list(known))  # of which views may appear
        self.traffic: dict[Collective, Traffic] = {}
        self.peak = self.peak_buffers = 0
        self._storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._buffers: set[int] = set()
        self._fsdp: set[int] = set()  # what FSDP2 packs into or gets from a collective
        self._purpose = ""
        self._bound = 0  # at least what is alive

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # its operators on local tensors come here
        output = func(*args, **(kwargs or {}))
        for tensor in _tensors(output):
            self._follow(tensor)
        if "c10d" in func.namespace:
            self._collective(func.__name__.split(".")[0], args)
        elif func.namespace == "fsdp":
            packed = _storages(output, (kwargs or {}).get("out"))
            self._fsdp |= packed
            # What is gathered is copied into the parameters as they are used.
            unpacks = func is torch.ops.fsdp.split_with_sizes_copy.default
            self._buffers |= _storages(args, kwargs) if unpacks else packed
            self._look()
        return output

    def alive(self) -> dict[int, int]:
        """Bytes of every storage made since the start and not freed, by identity."""
        sizes = {}
        for key, reference in self._storages.items():
            if (storage := reference()) is not None:
                sizes[key] = storage.nbytes()
        return sizes

    def _follow(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._storages or key in self._known:
            return
        forget = self._forget(key)
        self._storages[key] = weakref.ref(storage, forget)
        self._bound += storage.nbytes()
        if self._bound > self.peak:
            self._look()

    def _look(self) -> None:
        """FSDP2 empties and fills storages in place, which no operator shows."""
        sizes = self.alive()
        self._bound = sum(sizes.values())
        if self._bound > self.peak:
            self.peak = self._bound
            self.peak_buffers = sum(n for k, n in sizes.items() if k in self._buffers)

    def _forget(self, key: int) -> Any:
        def forget(_: Any) -> None:
            self._storages.pop(key, None)
            self._buffers.discard(key)
            self._fsdp.discard(key)

        return forget

    def reset_peak(self) -> None:
        """Starts to look for a new peak, from what is alive now."""
        self.peak = -1
        self._look()

    @contextmanager
    def window(self, purpose: str = "") -> Iterator[dict[Collective, Traffic]]:
        """Collects the traffic of what runs inside in the dictionary it yields. Without a
        `purpose`, FSDP2's gathers are for parameters, its reductions for gradients, and all
        others for activations."""
        outer = self.traffic, self._purpose
        self.traffic, self._purpose = {}, purpose
        try:
            yield self.traffic
        finally:
            self.traffic, self._purpose = outer

    def _collective(self, operator: str, args: tuple[Any, ...]) -> None:
        touched = _storages(args)
        self._buffers |= touched
        if operator in _UNCOUNTED:
            return
        if operator not in _NAMES:
            raise NotImplementedError(f"collective {operator} is not accounted for")
        name, group = _NAMES[operator], _group(args)
        purpose = self._purpose or "activations"
        if not self._purpose and touched & self._fsdp:
            purpose = "parameters" if name == "all-gather" else "gradients"
            self._fsdp |= touched  # a sum over copies follows a reduction over shards
        key = Collective(name, self.dimensions[group.group_name], purpose)
        received = _received(name, args, group)
        self.traffic[key] = self.traffic.get(key, Traffic()).plus(Traffic(1, received))


def _tensors(*values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _storages(*values: Any) -> set[int]:
    return {tensor.untyped_storage()._cdata for tensor in _tensors(*values)}


def _group(args: tuple[Any, ...]) -> dist.ProcessGroup:
    for arg in args:
        if isinstance(arg, str) and arg not in ("sum", "avg", "min", "max", "product"):
            name: Any = arg
            return torch._C._distributed_c10d._resolve_process_group(name)
        if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type()):
            return dist.ProcessGroup.unbox(arg)
    raise NotImplementedError("a collective without a process group")


def _received(name: str, args: tuple[Any, ...], group: dist.ProcessGroup) -> float:
    """Bytes a rank receives, with ring algorithms; the same leaves it."""
    tensors = _tensors(args)
    size = dist.get_world_size(group)
    largest = max(t.numel() * t.element_size() for t in tensors)
    others = (size - 1) / size
    if name == "all-gather":  # functional calls show the input only
        whole = largest if len(tensors) > 1 else largest * size
        return whole * others
    if name == "all-to-all":
        splits = next((a for a in args if isinstance(a, list) and len(a) == size), None)
        return largest if splits and len({*splits}) > 1 else largest * others
    if name == "all-reduce":
        return 2 * largest * others
    return largest * (others if name == "reduce-scatter" else 1)


def merge(*parts: tuple[dict[Collective, Traffic], float]) -> dict[Collective, Traffic]:
    """The weighted sum of what several windows saw."""
    sums: dict[Collective, Traffic] = {}
    for traffic, weight in parts:
        for key, value in traffic.items():
            sums[key] = sums.get(key, Traffic()).plus(value, weight)
    return {key: value for key, value in sums.items() if value.count}
