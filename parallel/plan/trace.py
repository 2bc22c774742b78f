"""One micro-batch and one update of a rank's part of a model, recorded.

The code that trains runs here on fake tensors (shapes without numbers) and a fake process group, so
one process stands for any number of ranks. Runs on real tensors alike (the tests compare the two).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._redistribute import _gen_transform_infos
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.optim import Optimizer
from torch.testing._internal.distributed.fake_pg import FakeStore

from rondo.kernels.tiles import whole_tensors
from rondo.models import Decoder
from rondo.parallel.data_parallel import finish_gradients
from rondo.parallel.mesh import (
    DATA,
    EXPERT,
    EXPERT_SHARD,
    SHARDED,
    Layout,
    Ranks,
    make_mesh,
    submesh,
)
from rondo.parallel.pipeline import MicroBatch
from rondo.parallel.plan.recorder import Collective, Recorder, Traffic, merge

MakeOptimizers = Callable[[list[Decoder]], list[Optimizer]]
Traffics = dict[Collective, Traffic]


@dataclass
class Trace:
    """What one part of a model takes on one rank. Bytes; all but the peaks add up over layers."""

    parameters: float = 0
    """Local shards, float32."""
    gradients: float = 0
    """Local shards, float32."""
    accumulated: float = 0
    """Gradients of all parameters that FSDP2 shards, float32: with several micro-batches they
    wait, not yet reduced over ranks, for the last."""
    optimizer: float = 0
    """Optimizer state."""
    activations: float = 0
    """What the forward pass of a micro-batch keeps for its backward pass."""
    gathered: float = 0
    """Full parameters that stay gathered after the forward pass."""
    loss_peak: float = 0
    """Most that is alive beside the above: output matrix and loss,"""
    block_peak: float = 0
    """blocks, forward and backward,"""
    embedding_peak: float = 0
    """and the embedding's backward pass, when no activations are left."""
    buffer_peak: float = 0
    """Of the blocks' peak: collectives' buffers and gathered parameters."""
    step: Traffics = field(default_factory=dict)
    """Collectives of a micro-batch that is the only one of its step,"""
    finish: Traffics = field(default_factory=dict)
    """after it, of gradients that FSDP2 does not hold, all in one call,"""
    update: Traffics = field(default_factory=dict)
    """and of the optimizer."""

    def plus(self, other: Trace, weight: float) -> Trace:
        """This and `weight` times `other`; peaks are the larger."""
        sums: dict[str, Any] = {}
        for one in fields(self):
            a, b = getattr(self, one.name), getattr(other, one.name)
            if one.name == "finish":
                sums[one.name] = _one_call(a, b, weight)
            elif isinstance(a, dict):
                sums[one.name] = merge((a, 1), (b, weight))
            else:
                sums[one.name] = max(a, b) if one.name.endswith("_peak") else a + weight * b
        return Trace(**sums)


def _one_call(a: Traffics, b: Traffics, weight: float) -> Traffics:
    """Bytes add up over layers, but all layers share a call."""
    calls = {key: max(t[key].count for t in (a, b) if key in t) for key in a | b}
    empty = Traffic()
    return {
        key: Traffic(count, a.get(key, empty).bytes + weight * b.get(key, empty).bytes)
        for key, count in calls.items()
    }


@contextmanager
def fake_ranks(layout: Layout, pp: int = 0) -> Iterator[Ranks]:
    """A rank of pipeline rank `pp` in a fake process group: the last of its sequence-parallel
    group, since the first receives nothing from before it, and otherwise the first everywhere,
    which holds the largest shards."""
    rank = pp * (layout.size // layout.pp) + (layout.cp - 1) * layout.tp
    dist.init_process_group("fake", rank=rank, world_size=layout.size, store=FakeStore())
    # Torch would warn that Muon gathers in two steps, for every matrix.
    logger = logging.getLogger("torch.distributed.tensor._redistribute")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        mesh = make_mesh("cpu", layout) if layout.size > 1 else None  # as `process_group` does
        yield Ranks(rank, layout.size, torch.device("cpu"), mesh)
    finally:
        logger.setLevel(level)
        dist.destroy_process_group()
        # Meshes of equal shape are equal, but their process groups are gone.
        _clear_sharding_prop_cache()
        _gen_transform_infos.cache_clear()


def group_dimensions(ranks: Ranks, experts: DeviceMesh | None = None) -> dict[str, str]:
    """By name of each process group, the dimensions of the mesh (and of an `expert_mesh`) that its
    ranks differ in; groups of one rank have none. (Torch may give dimensions that span the same
    ranks one group.)"""
    if ranks.mesh is None:
        return {}
    found: dict[str, str] = {}
    if experts is not None:
        for name in (EXPERT, EXPERT_SHARD, "dp_replicate", "tp"):
            group = submesh(experts, name).get_group()
            found[group.group_name] = name if group.size() > 1 else ""
    parts = {name: [name] for name in Layout._fields}
    parts |= {SHARDED: ["dp_shard", "cp"], DATA: ["dp_replicate", "dp_shard", "cp"]}
    sizes = ranks.layout._asdict()
    return found | {
        ranks.group(name).group_name: " x ".join(one for one in dims if sizes[one] > 1)
        for name, dims in parts.items()
    }


def fake_trace(
    part: Decoder,
    ranks: Ranks,
    inputs: tuple[int, int],
    make: MakeOptimizers,
    experts: DeviceMesh | None = None,
) -> Trace:
    """The trace of a part on the meta device, which is materialised as fake tensors."""
    with FakeTensorMode(allow_non_fake_inputs=True), whole_tensors():
        part.to_empty(device=ranks.device)
        return record(part, ranks, inputs, make, experts)


def record(
    part: Decoder,
    ranks: Ranks,
    inputs: tuple[int, int],
    make: MakeOptimizers,
    experts: DeviceMesh | None = None,
) -> Trace:
    """The trace of a materialised part; `inputs` is (sequences, tokens of each on this rank), and
    `experts` the mesh that its experts are divided over."""
    params = list(part.parameters())
    trace = Trace(parameters=_bytes(params), accumulated=sum(map(_unsharded_bytes, params)))
    with Recorder(group_dimensions(ranks, experts), map(_local, params)) as recorder:
        _Run(part, ranks, inputs, recorder).step(trace)
        with recorder.window("gradients") as trace.finish:
            finish_gradients([part], ranks)
        trace.gradients = _bytes(p.grad for p in params if p.grad is not None)
        optimizers = make([part])
        with recorder.window("optimizer") as trace.update:
            for optimizer in optimizers:
                optimizer.step()
    trace.optimizer = sum(
        _bytes(value for value in state.values() if isinstance(value, Tensor) and value.ndim)
        for optimizer in optimizers
        for state in optimizer.state.values()
    )
    return trace


class _Run:
    """Forward and backward passes of one part, on inputs made once."""

    peaks: tuple[int, int] | None
    """Peaks of the last backward pass down to the embedding."""

    def __init__(
        self, part: Decoder, ranks: Ranks, inputs: tuple[int, int], recorder: Recorder
    ) -> None:
        self.part, self.ranks, self.recorder = part, ranks, recorder
        tokens = torch.zeros(*inputs, dtype=torch.long, device=ranks.device)
        self.batch = MicroBatch(tokens, tokens, tokens, tokens)
        self.crossing = crossing(part, inputs, ranks.layout.tp, ranks.device)
        self.gradients = [torch.zeros_like(x) for x in self.crossing.values()]
        self.peaks = None
        if part.embedding is not None:
            part.embedding.register_forward_hook(
                lambda _, args, output: output.register_hook(self._at_embedding) and None
            )

    def _at_embedding(self, _: Tensor) -> None:
        """Keeps the peak of the blocks' backward pass, and starts a new one."""
        self.peaks = (self.recorder.peak, self.recorder.peak_buffers)
        self.recorder.reset_peak()

    def step(self, trace: Trace) -> None:
        """One micro-batch; what it sends and holds is put into `trace`."""
        part, recorder = self.part, self.recorder
        recorder.reset_peak()
        held = _other(recorder, part)
        with recorder.window() as trace.step:
            outputs = self._forward()
            trace.gathered = _gathered(recorder, part)
            trace.activations = _other(recorder, part) - held
            kept = held + trace.gathered + trace.activations
            forward_peak = recorder.peak - kept
            recorder.reset_peak()
            outputs, gradients = self._loss(outputs)
            trace.loss_peak = recorder.peak - kept if part.last else 0
            recorder.reset_peak()
            buffers = recorder.peak_buffers
            self.peaks = None
            torch.autograd.backward(outputs, gradients)
            del outputs, gradients
        backward = self.peaks or (recorder.peak, recorder.peak_buffers)
        trace.block_peak = max(0, forward_peak, backward[0] - kept)
        trace.buffer_peak = max(0, backward[1] - buffers)
        if self.peaks:
            trace.embedding_peak = recorder.peak - held - trace.gathered

    def _forward(self) -> list[Tensor]:
        part, batch = self.part, self.batch
        crossing = dict(self.crossing)
        tokens = crossing.pop("hidden")
        output = part(
            batch.tokens if part.first else tokens,
            segment_ids=batch.segment_ids,
            positions=batch.positions,
            carry=None if part.first else crossing,
            return_state=False,
        )
        return [output.hidden] if part.last else [output.hidden, *output.carry.values()]

    def _loss(self, outputs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """What the backward pass of the blocks starts from; the last part runs its loss first."""
        if not self.part.last:
            pairs = zip(outputs, self.gradients, strict=True)
            kept = [(x, gradient) for x, gradient in pairs if x.requires_grad]
            return [x for x, _ in kept], [gradient for _, gradient in kept]
        hidden = outputs[0].detach().requires_grad_()
        self.part.hidden_loss(hidden, self.batch.targets).backward()
        assert hidden.grad is not None, "the loss depends on the hidden states"
        return outputs, [hidden.grad]


def crossing(
    part: Decoder, inputs: tuple[int, int], tp: int, device: torch.device
) -> dict[str, Tensor]:
    """What one stage of a pipeline hands to the next, by name."""
    kind = part.activation_dtype or next(part.parameters()).dtype
    shape, wide = (inputs[0], inputs[1] // tp), torch.promote_types(kind, torch.float32)
    tensors = {"hidden": torch.zeros(*shape, part.config.dim, dtype=kind, device=device)}
    for name, width in part.carried.items():
        tensors[name] = torch.zeros(*shape, width, dtype=wide, device=device)
    return {name: tensor.requires_grad_() for name, tensor in tensors.items()}


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _bytes(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in map(_local, tensors))


def _unsharded_bytes(param: Tensor) -> float:
    """Bytes of a parameter that FSDP2 shards, as gathered (tensor-parallel ranks stay apart) and
    of its own type; 0 for others."""
    if not isinstance(param, DTensor):
        return 0
    mesh, size = param.device_mesh, param.numel() * param.element_size()
    names = mesh.mesh_dim_names or ()
    for name, ranks, placement in zip(names, mesh.shape, param.placements, strict=True):
        size /= ranks if name == "tp" and placement.is_shard() else 1
        size /= ranks if name == EXPERT else 1
    return size if {SHARDED, EXPERT_SHARD} & {*names} else 0


def _storages(part: nn.Module) -> set[int]:
    return {_local(param).untyped_storage()._cdata for param in part.parameters()}


def _gathered(recorder: Recorder, part: nn.Module) -> int:
    """Bytes of the parameters as they are now, as far as they were gathered since the start."""
    mine = _storages(part)
    return sum(size for key, size in recorder.alive().items() if key in mine)


def _other(recorder: Recorder, part: nn.Module) -> int:
    """Bytes made since the start that are alive and not parameters."""
    mine = _storages(part)
    return sum(size for key, size in recorder.alive().items() if key not in mine)
