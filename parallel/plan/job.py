"""A model laid out over ranks: what the worst rank holds, and what it sends in a step."""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from rondo.models import ModelConfig
from rondo.models.config import LayerSpec
from rondo.parallel.build import PRECISIONS, build_part
from rondo.parallel.config import ParallelConfig
from rondo.parallel.mesh import DATA, SHARDED, Layout, Ranks, layout
from rondo.parallel.pipeline import rank_stages, stage_count, stage_layers
from rondo.parallel.plan.recorder import Traffic, merge
from rondo.parallel.plan.schedule import in_flight
from rondo.parallel.plan.trace import (
    MakeOptimizers,
    Trace,
    crossing,
    fake_ranks,
    fake_trace,
)


@dataclass(frozen=True)
class Job:
    """What is to be laid out."""

    config: ModelConfig
    parallel: ParallelConfig
    ranks: int
    length: int
    """Tokens in a sequence."""
    global_batch: int
    """Sequences in a step."""
    micro_batch: int
    """Sequences a rank runs at once."""
    precision: str
    make_optimizers: MakeOptimizers
    """The optimizers of the run, from this rank's parts of the model."""

    @property
    def layout(self) -> Layout:
        """Sizes of the mesh."""
        return layout(self.parallel, self.ranks)

    @property
    def micro_batches(self) -> int:
        """Micro-batches of a rank in a step."""
        return self.global_batch // self.layout.data_size // self.micro_batch


@dataclass
class Memory:
    """Bytes of one rank, by part."""

    parameters: float = 0
    gradients: float = 0
    optimizer: float = 0
    activations: float = 0
    logits: float = 0
    communication: float = 0
    workspace: float = 0

    @property
    def total(self) -> float:
        """All of it."""
        return sum(dataclasses.astuple(self))


@dataclass
class RankPlan:
    """One pipeline rank of a plan (all ranks beside it hold and send the same)."""

    pp_rank: int
    memory: Memory
    traffic: dict[tuple[str, str], Traffic] = field(default_factory=dict)
    """(collective, dimension of the mesh) -> count and bytes in a step."""
    spans: dict[str, list[int]] = field(default_factory=dict)
    """Dimension of the mesh -> the ranks of this rank's group."""


def trace_job(job: Job) -> list[RankPlan]:
    """What the first and the last rank of the pipeline hold and send."""
    return [trace_rank(job, rank) for rank in sorted({0, job.layout.pp - 1})]


def trace_rank(job: Job, pp_rank: int, *, whole: bool = False) -> RankPlan:
    """What rank `pp_rank` of the pipeline holds and sends.

    Layers of one kind are alike: one of each kind is traced, and then all but one, to see what
    each layer of its kind adds. `whole` traces all layers instead.
    """
    shape, schedule = job.layout, job.parallel.pipeline_schedule
    cuts = stage_layers(job.config, stage_count(shape.pp, schedule), job.length)
    numbers = rank_stages(pp_rank, shape.pp, schedule)
    with fake_ranks(shape, pp_rank) as ranks:
        traces = [trace_layers(job, ranks, cuts[n], whole=whole) for n in numbers]
        boundary = _boundary(job, ranks, [cuts[n] for n in numbers])
        names = _group_names(ranks)
        spans = {name: dist.get_process_group_ranks(ranks.group(name)) for name in names.values()}
    total = traces[0]
    for other in traces[1:]:
        total = total.plus(other, 1)
    flights = in_flight(schedule, shape.pp, pp_rank, job.micro_batches) / len(traces)
    memory = _memory(total, flights, boundary * job.micro_batches)
    count = job.micro_batches
    traffic = merge(
        (total.first, min(1, count - 1)),
        (total.middle, max(0, count - 2)),
        (total.last, 1),
        (total.finish, 1),
        (total.update, 1),
    )
    by_dim: dict[tuple[str, str], Traffic] = {}
    for key, value in traffic.items():
        if value.bytes > 0:  # groups of one rank send nothing
            place = key.name, names.get(key.group, "other")
            by_dim[place] = by_dim.get(place, Traffic()).plus(value)
    if boundary:
        received = sum((i > 0) + (i + 1 < len(cuts)) for i in numbers)
        key = ("send/receive", "pp")  # beside a tied embedding's gradients
        own = Traffic(received * count, boundary * count)
        by_dim[key] = by_dim.get(key, Traffic()).plus(own)
    return RankPlan(pp_rank, memory, by_dim, spans)


def trace_layers(job: Job, ranks: Ranks, layers: range, *, whole: bool = False) -> Trace:
    """The trace of a run of layers."""
    specs = job.config.layers()
    if whole:
        return _trace(job, ranks, job.config, layers)
    counts = Counter(_entry(specs[i]) for i in layers)
    kinds = list(dict.fromkeys(_entry(spec) for spec in specs))
    base = _trace_kinds(job, ranks, layers, kinds, list(counts))
    total = base
    for kind, count in counts.items():
        if count > 1:
            others = [other for other in counts if other != kind] or [kind, kind]
            other = _trace_kinds(job, ranks, layers, kinds, others)
            more = (count - 1) / (len(counts) - len(others))
            total = total.plus(base, more).plus(other, -more)
    return total


def _trace_kinds(
    job: Job, ranks: Ranks, layers: range, kinds: list[str], wanted: list[str]
) -> Trace:
    """The trace of layers of the `wanted` kinds, at the place in the model of `layers`: the start,
    the end, both or neither."""
    before = kinds if layers.start > 0 else []
    after = kinds if layers.stop < job.config.num_layers else []
    pattern = [*before, *wanted, *after]
    config = dataclasses.replace(job.config, num_layers=len(pattern), pattern=pattern)
    return _trace(job, ranks, config, range(len(before), len(before) + len(wanted)))


def _trace(job: Job, ranks: Ranks, config: ModelConfig, layers: range) -> Trace:
    part = build_part(config, layers, ranks, job.parallel, PRECISIONS[job.precision])
    inputs = job.micro_batch, job.length // job.layout.cp
    return fake_trace(part, ranks, inputs, job.micro_batches, job.make_optimizers)


def _entry(spec: LayerSpec) -> str:
    return f"{spec.name}+{spec.ffn}"


def _memory(trace: Trace, flights: float, pipeline_buffers: float) -> Memory:
    """Memory at the worst moment: at the end of a forward pass, or in a backward pass."""
    activations = flights * trace.activations
    embedding = trace.embedding_peak - trace.activations  # which are gone by then
    extra = max(trace.loss_peak, trace.block_peak, embedding)
    buffers = min(trace.buffer_peak, extra - trace.loss_peak)
    return Memory(
        parameters=trace.parameters,
        gradients=trace.gradients + trace.accumulated,
        optimizer=trace.optimizer,
        activations=activations,
        logits=trace.loss_peak,
        communication=trace.gathered + pipeline_buffers + buffers,
        workspace=extra - trace.loss_peak - buffers,
    )


def _boundary(job: Job, ranks: Ranks, parts: list[range]) -> float:
    """Bytes of what the stages of a rank receive for one micro-batch: activations from the stage
    before, gradients from the one after. Torch keeps a buffer for each until the step is over."""
    if job.layout.pp == 1:
        return 0
    part = build_part(job.config, parts[0], ranks, job.parallel, PRECISIONS[job.precision])
    inputs = job.micro_batch, job.length // job.layout.cp
    tensors = crossing(part, inputs, job.layout.tp, torch.device("meta"))
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    ends = sum((p.start > 0) + (p.stop < job.config.num_layers) for p in parts)
    return ends * size


def _group_names(ranks: Ranks) -> dict[str, str]:
    """Name of each process group -> the dimension of the mesh it runs along. Dimensions that span
    the same ranks may share a group; the first of their names here is taken."""
    found: dict[str, str] = {}
    for name in ("tp", "cp", "pp", SHARDED, DATA, "dp_replicate", "dp_shard"):
        found.setdefault(ranks.group(name).group_name, name)
    return found
