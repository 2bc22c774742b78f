"""A prediction of a step's time from what is computed and sent; not a measurement."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from rondo.models import Decoder, ModelConfig
from rondo.parallel.mesh import DATA, SHARDED
from rondo.parallel.pipeline import stage_count, stage_layers
from rondo.parallel.plan.hardware import Hardware
from rondo.parallel.plan.job import Job, RankPlan, trace_job
from rondo.parallel.plan.recorder import Traffic
from rondo.parallel.plan.schedule import bubble

EFFICIENCY = 0.5
"""Share of the peak that a GPU reaches while it computes; an assumption, to be replaced by a
measured one."""
MEMORY_SHARE = 0.9
"""Share of a GPU's memory that a plan may fill: the driver, the communication library and
fragmentation take the rest."""
OVERLAPPED = (SHARDED, "dp_replicate", "dp_shard", DATA)
"""Dimensions whose traffic runs beside the computation (FSDP2's prefetch)."""


@dataclass
class Times:
    """Seconds of a step on the busiest rank."""

    compute: float
    by_dimension: dict[str, float]
    """Seconds of the traffic along each dimension of the mesh, as if nothing else ran."""
    optimizer: float
    bubble: float
    """Idle seconds of a pipeline that fills and drains."""
    exposed: float
    """What of the overlapped traffic the computation does not hide."""
    step: float


@dataclass
class Plan:
    """A job on hardware."""

    job: Job
    hardware: Hardware
    efficiency: float
    ranks: list[RankPlan]
    times: Times
    model_flops: float
    """FLOPs of a step over all ranks: 3 x the forward pass, without recomputation."""
    parameters: int

    @property
    def worst(self) -> RankPlan:
        """The rank that needs most memory."""
        return max(self.ranks, key=lambda rank: rank.memory.total)

    @property
    def fits(self) -> bool:
        """Whether the worst rank's memory is within what a plan may fill."""
        return self.worst.memory.total <= MEMORY_SHARE * self.hardware.memory

    @property
    def mfu(self) -> float:
        """Model FLOPs over what all GPUs could do in a step's time."""
        return self.model_flops / (self.times.step * self.job.ranks * self.hardware.peak_flops)

    @property
    def tokens_per_second(self) -> float:
        """Over all ranks."""
        return self.job.global_batch * self.job.length / self.times.step

    @property
    def bubble_share(self) -> float:
        """Idle share of a step."""
        return self.times.bubble / self.times.step

    @property
    def assumptions(self) -> list[str]:
        """What the predicted time rests on."""
        return [
            f"a GPU computes at {self.efficiency:.0%} of its {self.hardware.peak_flops / 1e12:.0f} "
            "TFLOP/s (assumed, not measured; set it with --efficiency)",
            "traffic of data-parallel dimensions overlaps computation and costs what is longer; "
            "traffic of tp, cp and pp does not overlap and is added",
            "a group inside a node uses its links, any other the slower network, at full "
            "bandwidth, plus a latency per collective times log2 of the group's size",
            f"a layout fits when it fills at most {MEMORY_SHARE:.0%} of a GPU's memory; "
            "activations are those of the PyTorch kernels that a CPU runs",
        ]


def make_plan(job: Job, hardware: Hardware, efficiency: float = EFFICIENCY) -> Plan:
    """Traces a job and predicts its step."""
    return predict(job, trace_job(job), hardware, efficiency)


def predict(job: Job, ranks: list[RankPlan], hardware: Hardware, efficiency: float) -> Plan:
    """The plan of a traced job."""
    cost = model_cost(job.config, job.length)
    tokens = job.global_batch * job.length
    compute = _compute_flops(job, tokens) / (hardware.peak_flops * efficiency)
    candidates = [_times(job, rank, hardware, compute) for rank in ranks]
    times = max(candidates, key=lambda t: t.step)
    return Plan(job, hardware, efficiency, ranks, times, 3 * cost[0] * tokens, cost[1])


def model_cost(config: ModelConfig, length: int) -> tuple[float, int]:
    """Forward FLOPs a token, and parameters, of a whole model."""
    with torch.device("meta"):
        cost = Decoder(config).cost(length)
    return cost.flops, cost.parameters


def _compute_flops(job: Job, tokens: float) -> float:
    """FLOPs of a step on a rank of the pipeline's busiest stage. The backward pass is twice the
    forward pass; full activation checkpointing adds a forward pass of the blocks."""
    shape, schedule = job.layout, job.parallel.pipeline_schedule
    with torch.device("meta"):
        blocks: Any = Decoder(job.config).blocks
    costs = [block.cost(job.length).flops for block in blocks.values()]
    cuts = stage_layers(job.config, stage_count(shape.pp, schedule), job.length)
    passes = 4 if job.parallel.activation_checkpointing == "full" else 3
    stages = [sum(costs[i] for i in cut) * passes for cut in cuts]
    stages[-1] += 3 * 2.0 * job.config.vocab_size * job.config.dim
    loads = [sum(stages[i :: shape.pp]) for i in range(shape.pp)]
    return max(loads) * tokens / (shape.size / shape.pp)


def _times(job: Job, rank: RankPlan, hardware: Hardware, compute: float) -> Times:
    by_dimension: dict[str, float] = {}
    for (_, dimension), traffic in rank.traffic.items():
        group = rank.spans.get(dimension, range(job.ranks))
        seconds = link_seconds(traffic, group, hardware)
        by_dimension[dimension] = by_dimension.get(dimension, 0.0) + seconds
    hidden = sum(t for name, t in by_dimension.items() if name in OVERLAPPED)
    busy = compute + sum(t for name, t in by_dimension.items() if name not in OVERLAPPED)
    share = bubble(job.parallel.pipeline_schedule, job.layout.pp, job.micro_batches)
    idle = busy * share / (1 - share)
    # Parameters and states are read and written, gradients read.
    memory = rank.memory
    touched = 2 * (memory.parameters + memory.optimizer) + memory.parameters
    optimizer = touched / hardware.memory_bandwidth
    exposed = max(0.0, hidden - compute)
    step = busy + idle + exposed + optimizer
    return Times(compute, by_dimension, optimizer, idle, exposed, step)


def link_seconds(traffic: Traffic, group: Iterable[int], hardware: Hardware) -> float:
    """Seconds of collectives among `group`: bandwidth of the slowest link it crosses, and a start
    for each."""
    members = list(group)
    inside = len({rank // hardware.node_size for rank in members}) == 1
    bandwidth = hardware.node_bandwidth if inside else hardware.network_bandwidth
    latency = hardware.node_latency if inside else hardware.network_latency
    starts = traffic.count * max(1, math.ceil(math.log2(max(2, len(members)))))
    return traffic.bytes / bandwidth + starts * latency
