"""The layouts of a model on so many GPUs that are predicted to be fastest."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Literal

from rondo.parallel.build import PRECISIONS
from rondo.parallel.config import ParallelConfig
from rondo.parallel.plan.estimate import (
    MEMORY_SHARE,
    Plan,
    compute_flops,
    link_seconds,
    make_plan,
)
from rondo.parallel.plan.hardware import Hardware
from rondo.parallel.plan.job import Job
from rondo.parallel.plan.layers import Layers
from rondo.parallel.plan.rank import plan_ranks
from rondo.parallel.plan.recorder import Collective, Traffic
from rondo.parallel.plan.schedule import bubble
from rondo.parallel.plan.trace import Trace

SHORTEST_STRETCH = 2048
"""Fewest tokens of a sequence on a sequence-parallel rank that are tried."""


def search(
    job: Job,
    hardware: Hardware,
    *,
    efficiency: float,
    possible: Callable[[ParallelConfig], bool],
    wanted: int = 5,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Plan]:
    """The best layouts that fit, by predicted step time, best first.

    Layouts are looked at in the order of a time that they cannot beat, until this exceeds the time
    of the best found. Layers are traced once for all layouts that divide a layer alike; how data-
    parallel ranks share its parameters is calculated. The best are then traced in full. `possible`
    says whether training would accept a layout.
    """
    jobs = [dataclasses.replace(job, parallel=p) for p in layouts(job, hardware) if possible(p)]
    jobs = [one for one in jobs if least_memory(one) <= MEMORY_SHARE * hardware.memory]
    least = {id(one): least_seconds(one, hardware, efficiency) for one in jobs}
    traced: dict[str, Layers] = {}
    best: list[Plan] = []
    for done, one in enumerate(sorted(jobs, key=lambda one: least[id(one)])):
        progress(done, len(jobs) + wanted)
        if len(best) == wanted and least[id(one)] > best[-1].times.step:
            break
        plan = Plan(one, hardware, efficiency, plan_ranks(one, _calculated(one, traced)))
        if plan.fits:
            best = sorted([*best, plan], key=lambda plan: plan.times.step)[:wanted]
    found = []
    for done, plan in enumerate(best):
        progress(len(jobs) + done, len(jobs) + wanted)
        found.append(make_plan(plan.job, hardware, efficiency))
    return sorted((p for p in found if p.fits), key=lambda plan: plan.times.step)


def layouts(job: Job, hardware: Hardware) -> Iterator[ParallelConfig]:
    """Powers of two along every dimension: tp within a node, cp while stretches are long enough, pp
    up to the layers, parameters sharded over all data-parallel ranks or over those of a node, and
    each form of activation checkpointing."""
    length = job.model.length
    modes: tuple[Literal["none", "selective", "full"], ...] = ("none", "selective", "full")
    for tp, cp, pp in itertools.product(_powers(hardware.node_size), _powers(64), _powers(64)):
        if length // cp < min(SHORTEST_STRETCH, length) or job.ranks % (tp * cp * pp):
            continue
        data = job.ranks // (tp * cp * pp)
        near = max(1, hardware.node_size // (tp * cp))
        for shard, mode in itertools.product(
            sorted({data, near} if data % near == 0 else {data}), modes
        ):
            yield dataclasses.replace(
                job.parallel,
                pp=pp,
                dp_replicate=data // shard,
                dp_shard=shard,
                cp=cp,
                tp=tp,
                activation_checkpointing=mode,
            )


def least_memory(job: Job) -> float:
    """Bytes that a layout takes at least on its fullest rank: parameters, gradients and one moment
    of each (Muon), and what pipelines or several micro-batches hold whole."""
    shape = job.layout
    own = job.model.parameters / (shape.tp * shape.pp)
    shards = own / (shape.dp_shard * shape.cp)
    gathered = PRECISIONS[job.precision].itemsize * own if shape.pp > 1 else 0
    return 8 * shards + 4 * (own if job.micro_batches > 1 else shards) + gathered


def least_seconds(job: Job, hardware: Hardware, efficiency: float) -> float:
    """Seconds of a step that a layout takes at least: computation; a gather and a reduction of
    hidden states, there and back, for each mixer and channel mixer of tensor-parallel ranks; the
    pipeline's bubble; a gather of parameters a step or micro-batch, a reduction of gradients."""
    shape, width = job.layout, PRECISIONS[job.precision].itemsize
    compute = compute_flops(job) / (hardware.peak_flops * efficiency)
    branches = sum(1 + (spec.ffn != "none") for spec in job.model.config.layers()) / shape.pp
    tokens = job.tokens / (shape.data_size * shape.cp)
    size = 4 * branches * tokens * job.model.config.dim * width * (1 - 1 / shape.tp)
    busy = compute + link_seconds(Traffic(0, size), shape, "tp", hardware)
    gathers = 1 if shape.pp > 1 else job.micro_batches
    own = job.model.parameters / (shape.tp * shape.pp)
    size = own * (width * gathers + 4) * (1 - 1 / (shape.dp_shard * shape.cp))
    hidden = link_seconds(Traffic(0, size), shape, "dp_shard x cp", hardware)
    share = bubble(job.parallel.pipeline_schedule, shape.pp, job.micro_batches)
    return busy / (1 - share) + max(0.0, hidden - compute)


def _calculated(job: Job, traced: dict[str, Layers]) -> Callable[[range], Trace]:
    """Traces of runs of layers from those on few data-parallel ranks, which are kept in `traced`
    by how a layer is divided."""
    few = dataclasses.replace(job.parallel, pp=min(job.parallel.pp, 2), dp_replicate=1, dp_shard=2)
    key = repr(few)
    ranks = few.pp * 2 * few.cp * few.tp
    if key not in traced:
        traced[key] = Layers(dataclasses.replace(job, parallel=few, ranks=ranks))
    layers = traced[key]
    return lambda part: reshard(layers.trace(part), layers.job, job)


def reshard(trace: Trace, before: Job, after: Job) -> Trace:
    """A trace as it would be with other numbers of data-parallel ranks."""
    old, new = before.layout, after.layout
    ranks = old.dp_shard * old.cp, new.dp_shard * new.cp
    share = ranks[0] / ranks[1]
    # Of what is gathered or reduced, a rank receives all but its own shard.
    others = (1 - 1 / ranks[1]) / (1 - 1 / ranks[0])
    along = " x ".join(n for n in ("dp_shard", "cp") if getattr(new, n) > 1)
    step = {}
    for key, traffic in trace.step.items():
        if key.purpose == "activations":
            step[key] = traffic
            continue
        step[key._replace(along=along)] = Traffic(traffic.count, traffic.bytes * others)
        if new.dp_replicate > 1 and key.purpose == "gradients":
            copies = 2 * trace.accumulated / ranks[1] * (1 - 1 / new.dp_replicate)
            summed = Collective("all-reduce", "dp_replicate", "gradients")
            step[summed] = Traffic(traffic.count, copies)
    return dataclasses.replace(
        trace,
        parameters=trace.parameters * share,
        gradients=trace.gradients * share,
        optimizer=trace.optimizer * share,
        step=step,
        finish={},  # a few vectors
        update={
            key._replace(along=along): Traffic(traffic.count, traffic.bytes * others)
            for key, traffic in trace.update.items()
        },
    )


def _powers(limit: int) -> list[int]:
    return [2**i for i in range(limit.bit_length()) if 2**i <= limit]
