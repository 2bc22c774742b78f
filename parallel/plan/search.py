"""The layouts of a model on so many GPUs that are predicted to be fastest."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Literal

from rondo.parallel.config import ParallelConfig
from rondo.parallel.plan.estimate import MEMORY_SHARE, Plan, make_plan, model_cost
from rondo.parallel.plan.hardware import Hardware
from rondo.parallel.plan.job import Job
from rondo.parallel.plan.schedule import bubble

SHORTEST_STRETCH = 2048
"""Fewest tokens of a sequence on a sequence-parallel rank that are tried."""


def search(
    job: Job,
    hardware: Hardware,
    *,
    efficiency: float,
    possible: Callable[[ParallelConfig], bool],
    wanted: int = 10,
    seconds: float = 200.0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Plan]:
    """The best layouts that fit, by predicted step time, best first.

    A rough formula orders all layouts; the most promising are traced, up to three times `wanted`
    or until `seconds` are over. `possible` says whether training would accept a layout.
    """
    jobs = [dataclasses.replace(job, parallel=p) for p in layouts(job, hardware) if possible(p)]
    cost = model_cost(job.config, job.length)
    scored = sorted((rough(one, hardware, efficiency, cost), i) for i, one in enumerate(jobs))
    best = [i for (over, _), i in scored if over < 2][: 3 * wanted]
    found: list[Plan] = []
    end = time.monotonic() + seconds
    for done, i in enumerate(best):
        progress(done, len(best))
        if time.monotonic() > end:
            break
        plan = make_plan(jobs[i], hardware, efficiency)
        found += [plan] if plan.fits else []
    progress(len(best), len(best))
    return sorted(found, key=lambda plan: plan.times.step)[:wanted]


def layouts(job: Job, hardware: Hardware) -> Iterator[ParallelConfig]:
    """Powers of two along every dimension: tp within a node, cp while stretches are long enough, pp
    up to the layers, parameters sharded over all data-parallel ranks or over those
    of a node, and each form of activation checkpointing."""
    modes: tuple[Literal["none", "selective", "full"], ...] = ("none", "selective", "full")
    for tp, cp, pp in itertools.product(_powers(hardware.node_size), _powers(64), _powers(64)):
        if job.length // cp < min(SHORTEST_STRETCH, job.length):
            continue
        if job.length % (cp * tp) or pp > job.config.num_layers or job.ranks % (tp * cp * pp):
            continue
        data = job.ranks // (tp * cp * pp)
        near = max(1, hardware.node_size // (tp * cp))
        for shard in {data, near} if data % near == 0 else {data}:
            for mode in modes:
                yield dataclasses.replace(
                    job.parallel,
                    pp=pp,
                    dp_replicate=data // shard,
                    dp_shard=shard,
                    cp=cp,
                    tp=tp,
                    activation_checkpointing=mode,
                )


def rough(
    job: Job, hardware: Hardware, efficiency: float, cost: tuple[float, int]
) -> tuple[int, float]:
    """(0, 1 or 2: memory seems to suffice, to be scarce, or far from it; seconds a step), by rules
    of thumb: only to decide what is traced first. `cost`: the model's (`model_cost`)."""
    shape, config = job.layout, job.config
    flops, parameters = cost
    passes = {"none": 3.0, "selective": 3.3, "full": 4.0}[job.parallel.activation_checkpointing]
    kept = {"none": 40, "selective": 16, "full": 2}[job.parallel.activation_checkpointing]
    tokens = job.micro_batch * job.length / shape.cp
    own = parameters / (shape.tp * shape.pp)
    layers = config.num_layers / shape.pp
    width = 2.0 * tokens * config.dim / shape.tp
    memory = 16 * own / (shape.dp_shard * shape.cp) + 2 * own * (shape.pp > 1)
    memory += 4 * own * (job.micro_batches > 1)
    memory += kept * width * layers * min(job.micro_batches, shape.pp)
    compute = passes * flops * job.global_batch * job.length
    compute /= job.ranks * hardware.peak_flops * efficiency
    tensor = 8 * layers * width * (shape.tp - 1) * job.micro_batches / hardware.node_bandwidth
    gathers = 1 if shape.pp > 1 else job.micro_batches
    inside = shape.tp * shape.cp * shape.dp_shard <= hardware.node_size
    data = (4 * gathers + 4) * own
    data /= hardware.node_bandwidth if inside else hardware.network_bandwidth
    data += 8 * own / shape.dp_shard * (shape.dp_replicate > 1) / hardware.network_bandwidth
    idle = bubble(job.parallel.pipeline_schedule, shape.pp, job.micro_batches)
    busy = (compute + tensor) / (1 - idle) + max(0.0, data - compute)
    room = MEMORY_SHARE * hardware.memory
    return int(memory > room) + int(memory > 2 * room), busy


def _powers(limit: int) -> list[int]:
    return [2**i for i in range(limit.bit_length()) if 2**i <= limit]
