"""What a rank allocates and sends, seen at torch's dispatcher; for fake and for real tensors."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
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
    group: str
    """Name of its process group."""


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
    through collectives or holds gathered parameters.
    """

    def __init__(self) -> None:
        super().__init__()
        self.traffic: dict[Collective, Traffic] = {}
        self.peak = self.peak_buffers = 0
        self._storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._buffers: set[int] = set()
        self._bound = 0  # at least what is alive

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # its operators on local tensors come here
        output = func(*args, **(kwargs or {}))
        collective = "c10d" in func.namespace
        if collective:
            self._count(func.__name__.split(".")[0], args)
        tensors = [t for t in tree_leaves(output) if isinstance(t, Tensor)]
        for tensor in tensors:
            self._follow(tensor)
        if collective or func is torch.ops.fsdp.split_with_sizes_copy.default:
            for tensor in tree_leaves((args, kwargs)):
                if isinstance(tensor, Tensor):
                    self._buffers.add(tensor.untyped_storage()._cdata)
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
        if key in self._storages:
            return
        forget = self._forget(key)
        self._storages[key] = weakref.ref(storage, forget)
        self._bound += storage.nbytes()
        if self._bound > self.peak:
            # FSDP2 empties storages in place, unseen here: look before believing the bound.
            sizes = self.alive()
            self._bound = sum(sizes.values())
            if self._bound > self.peak:
                self.peak = self._bound
                self.peak_buffers = sum(n for k, n in sizes.items() if k in self._buffers)

    def _forget(self, key: int) -> Any:
        def forget(_: Any) -> None:
            self._storages.pop(key, None)
            self._buffers.discard(key)

        return forget

    def reset_peak(self) -> None:
        """Starts to look for a new peak, from what is alive now."""
        sizes = self.alive()
        self._bound = self.peak = sum(sizes.values())
        self.peak_buffers = sum(n for k, n in sizes.items() if k in self._buffers)

    @contextmanager
    def window(self) -> Iterator[dict[Collective, Traffic]]:
        """Collects the traffic of what runs inside in the dictionary it yields."""
        outer, self.traffic = self.traffic, {}
        try:
            yield self.traffic
        finally:
            self.traffic = outer

    def _count(self, operator: str, args: tuple[Any, ...]) -> None:
        if operator in _UNCOUNTED:
            return
        if operator not in _NAMES:
            raise NotImplementedError(f"collective {operator} is not accounted for")
        group = _group(args)
        key = Collective(_NAMES[operator], group.group_name)
        received = _received(key.name, args, group)
        self.traffic[key] = self.traffic.get(key, Traffic()).plus(Traffic(1, received))


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
    tensors = [t for t in tree_leaves(args) if isinstance(t, Tensor)]
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
