"""What a rank of a job holds, and what it sends in a step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from rondo.models import Decoder
from rondo.parallel.build import PRECISIONS
from rondo.parallel.pipeline import rank_stages
from rondo.parallel.plan.job import Job
from rondo.parallel.plan.layers import Layers
from rondo.parallel.plan.recorder import Collective, Traffic, merge
from rondo.parallel.plan.schedule import in_flight
from rondo.parallel.plan.trace import Trace, crossing


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
    traffic: dict[Collective, Traffic] = field(default_factory=dict)
    """Count and bytes in a step."""


def plan_ranks(job: Job, trace: Callable[[range], Trace] | None = None) -> list[RankPlan]:
    """The ranks of the pipeline; `trace` gives the traces of runs of layers (default: those of
    `Layers`)."""
    trace = trace or Layers(job).trace
    return [plan_rank(job, rank, trace) for rank in range(job.layout.pp)]


def plan_rank(job: Job, pp_rank: int, trace: Callable[[range], Trace]) -> RankPlan:
    """What rank `pp_rank` of the pipeline holds and sends."""
    pp, schedule = job.layout.pp, job.parallel.pipeline_schedule
    parts = [job.stages[number] for number in rank_stages(pp_rank, pp, schedule)]
    total = trace(parts[0])
    for part in parts[1:]:
        total = total.plus(trace(part), 1)
    flights = in_flight(schedule, pp, pp_rank, job.micro_batches) / len(parts)
    received = _received(job, parts)
    memory = _memory(total, flights, received.bytes, job.micro_batches > 1)
    return RankPlan(pp_rank, memory, _traffic(job, total, received))


def _memory(trace: Trace, flights: float, received: float, accumulates: bool) -> Memory:
    """Memory at the worst moment: at the end of a forward pass, or in a backward pass."""
    activations = flights * trace.activations
    embedding = trace.embedding_peak - trace.activations  # which are gone by then
    extra = max(trace.loss_peak, trace.block_peak, embedding)
    buffers = min(trace.buffer_peak, extra - trace.loss_peak)
    # Shards appear as what waits for the last micro-batch goes.
    waiting = trace.accumulated if accumulates else 0
    return Memory(
        parameters=trace.parameters,
        gradients=max(trace.gradients, waiting),
        optimizer=trace.optimizer,
        activations=activations,
        logits=trace.loss_peak,
        communication=trace.gathered + received + buffers,
        workspace=extra - trace.loss_peak - buffers,
    )


def _traffic(job: Job, trace: Trace, received: Traffic) -> dict[Collective, Traffic]:
    """Collectives of a step. FSDP2 reduces gradients in the last micro-batch only, and stages of
    a pipeline gather parameters for the first only."""
    times = {
        "parameters": 1 if job.layout.pp > 1 else job.micro_batches,
        "gradients": 1,
        "activations": job.micro_batches,
    }
    once = [({key: value}, times[key.purpose]) for key, value in trace.step.items()]
    own = {Collective("send/receive", "pp", "activations"): received}
    found = merge(*once, (trace.finish, 1), (trace.update, 1), (own, 1))
    # Groups of one rank send nothing.
    return {key: traffic for key, traffic in found.items() if traffic.bytes > 0}


def _received(job: Job, parts: list[range]) -> Traffic:
    """What the stages of a rank receive in a step: activations from the stage before, gradients
    from the one after. Torch keeps a buffer for each until the step is over."""
    ends = sum((p.start > 0) + (p.stop < job.model.config.num_layers) for p in parts)
    if not ends:
        return Traffic()
    with torch.device("meta"):
        part = Decoder(job.model.config, layers=parts[0][:1])
    part.activation_dtype = PRECISIONS[job.precision]
    tensors = crossing(part, job.inputs, job.layout.tp, torch.device("meta"))
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    count = ends * job.micro_batches
    return Traffic(count, count * size)
