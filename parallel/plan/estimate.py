"""A prediction of a step's time from what is computed and sent; not a measurement."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field

from rondo.parallel.chain import parts
from rondo.parallel.mesh import EXPERT, EXPERT_SHARD, Layout
from rondo.parallel.plan.hardware import Hardware
from rondo.parallel.plan.job import Job
from rondo.parallel.plan.rank import RankPlan, plan_ranks
from rondo.parallel.plan.recorder import Traffic
from rondo.parallel.plan.schedule import bubble

EFFICIENCY = 0.5
"""Share of the peak that a GPU reaches while it computes; an assumption, to be replaced by a
measured one."""
MEMORY_SHARE = 0.9
"""Share of a GPU's memory that a plan may fill: the driver, the communication library and
fragmentation take the rest."""
OVERLAPPED = ("parameters", "gradients")
"""Purposes of traffic that runs beside the computation (FSDP2's prefetch)."""


@dataclass
class Times:
    """Seconds of a step on the busiest rank."""

    compute: float
    traffic: dict[str, float]
    """Of the collectives by purpose, as if nothing else ran."""
    exposed: float
    """What of the overlapped traffic the computation does not hide."""
    chains: float
    """Idle while a state is on its way from rank to rank of `cp`."""
    bubble: float
    """Idle while a pipeline fills and drains."""
    optimizer: float
    """Reading and writing parameters and optimizer state."""

    @property
    def waiting(self) -> float:
        """Traffic that nothing hides."""
        return sum(seconds for name, seconds in self.traffic.items() if name not in OVERLAPPED)

    @property
    def step(self) -> float:
        """All of it."""
        busy = self.compute + self.waiting + self.exposed + self.optimizer
        return busy + self.chains + self.bubble


@dataclass
class Plan:
    """A job on hardware."""

    job: Job
    hardware: Hardware
    efficiency: float
    """Share of the peak FLOP/s that a GPU is assumed to reach while it computes."""
    ranks: list[RankPlan]
    """Every rank of the pipeline."""
    times: Times = field(init=False)

    def __post_init__(self) -> None:
        times = [_times(self, rank) for rank in self.ranks]
        self.times = max(times, key=lambda one: one.step)

    @property
    def model_flops(self) -> float:
        """FLOPs of a step over all ranks: 3 x the forward pass, without recomputation."""
        return 3 * self.job.model.flops * self.job.tokens

    @property
    def worst(self) -> RankPlan:
        """The rank that needs most memory."""
        return max(self.ranks, key=lambda rank: rank.memory.total)

    @property
    def shown(self) -> list[RankPlan]:
        """The first, the fullest and the last rank of the pipeline."""
        return [self.ranks[i] for i in sorted({0, self.worst.pp_rank, len(self.ranks) - 1})]

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
        return self.job.tokens / self.times.step

    @property
    def bubble_share(self) -> float:
        """Idle share of a step."""
        return self.times.bubble / self.times.step


def make_plan(job: Job, hardware: Hardware, efficiency: float = EFFICIENCY) -> Plan:
    """Traces a job and predicts its step."""
    return Plan(job, hardware, efficiency, plan_ranks(job))


def compute_flops(job: Job) -> float:
    """FLOPs of a step on a rank of the pipeline's busiest stage. The backward pass is twice the
    forward pass; full activation checkpointing adds a forward pass of the blocks, selective one of
    what is not a product with a weight."""
    whole, rest = _passes(job)
    costs = [whole * both + (rest - whole) * own for both, own in job.model.layer_flops]
    return _busiest(job, costs, 3 * 2.0 * job.model.config.vocab_size * job.model.config.dim)


def chain_flops(job: Job) -> float:
    """FLOPs that a rank could do in the time that it waits for states: with P ranks and n parts of
    rows and heads, (P - 1) / n of the chains' own (`parallel/chain.py`)."""
    layout, passes = job.layout, _passes(job)[1]

    def waits(heads: int) -> float:
        return (layout.cp - 1) / math.prod(parts(job.micro_batch, heads // layout.tp, layout.cp))

    chains = job.model.chains
    return _busiest(
        job, [sum(passes * flops * waits(heads) for flops, heads in layer) for layer in chains]
    )


def chain_idle_share(job: Job) -> float:
    """Share of the chains' time in which a rank waits."""
    passes = _passes(job)[1]
    own = [passes * sum(flops for flops, _ in layer) for layer in job.model.chains]
    waiting = chain_flops(job)
    return waiting / (waiting + _busiest(job, own)) if waiting else 0.0


def _passes(job: Job) -> tuple[int, int]:
    """Forward passes' worth of a step: of products with weights, and of all else in a block."""
    mode = job.parallel.activation_checkpointing
    return {"none": (3, 3), "selective": (3, 4), "full": (4, 4)}[mode]


def _busiest(job: Job, costs: list[float], last: float = 0.0) -> float:
    """FLOPs of a rank of the busiest stage from those of each layer, a token, and `last` after all
    layers."""
    pp = job.layout.pp
    stages = [sum(costs[i] for i in cut) for cut in job.stages]
    stages[-1] += last
    return max(sum(stages[rank::pp]) for rank in range(pp)) * job.tokens / (job.ranks / pp)


def _times(plan: Plan, rank: RankPlan) -> Times:
    job, hardware = plan.job, plan.hardware
    speed = hardware.peak_flops * plan.efficiency
    compute, chains = compute_flops(job) / speed, chain_flops(job) / speed
    traffic: dict[str, float] = {}
    for key, sent in rank.traffic.items():
        seconds = link_seconds(sent, job.layout, key.along, hardware, job.parallel.ep)
        traffic[key.purpose] = traffic.get(key.purpose, 0.0) + seconds
    exposed = max(0.0, sum(traffic.get(name, 0.0) for name in OVERLAPPED) - compute)
    share = bubble(job.parallel.pipeline_schedule, job.layout.pp, job.micro_batches)
    idle = (compute + chains + traffic.get("activations", 0.0)) * share / (1 - share)
    # Parameters and states are read and written, gradients read.
    touched = 3 * rank.memory.parameters + 2 * rank.memory.optimizer
    return Times(compute, traffic, exposed, chains, idle, touched / hardware.memory_bandwidth)


def link_seconds(
    traffic: Traffic, layout: Layout, along: str, hardware: Hardware, ep: int = 1
) -> float:
    """Seconds of collectives along dimensions of the mesh, as in "dp_shard x cp": the bandwidth of
    the slowest link of a ring over the group's ranks, and a start for each collective. Ranks of a
    group that share a node share the way out of it, each with its own adapter. `ep` neighbours
    in "dp_shard x cp" are along "expert"."""
    steps = {name: math.prod(layout[i + 1 :]) for i, name in enumerate(layout._fields)}
    steps |= {EXPERT: layout.tp, EXPERT_SHARD: layout.tp * ep}
    sizes = {**layout._asdict(), EXPERT: ep, EXPERT_SHARD: layout.dp_shard * layout.cp // ep}
    names = along.split(" x ")
    offsets = [range(0, sizes[n] * steps[n], steps[n]) for n in names]
    members = [sum(parts) for parts in itertools.product(*offsets)]
    near = sum(rank < hardware.node_size for rank in members)
    extent = max(sizes[n] * steps[n] for n in names)
    bandwidth, latency = hardware.node_bandwidth, hardware.node_latency
    if near < len(members) or hardware.node_size % extent:
        bandwidth = min(bandwidth, near * hardware.network_bandwidth)
        latency = hardware.network_latency
    starts = traffic.count * math.ceil(math.log2(len(members)))
    return traffic.bytes / bandwidth + starts * latency
