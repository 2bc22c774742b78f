"""Traces of runs of layers, put together from those of single layers."""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass, field

import torch

from rondo.models import FFNS, MIXERS, ModelConfig
from rondo.models.config import LayerSpec, make_options
from rondo.parallel.build import PRECISIONS, build_part
from rondo.parallel.expert import expert_mesh
from rondo.parallel.plan.job import Job
from rondo.parallel.plan.trace import Trace, fake_ranks, fake_trace


@dataclass
class Layers:
    """The layers of a job. Those of one kind are alike: one of each kind is traced, and one beside
    what begins or ends the model; each trace is kept."""

    job: Job
    known: dict[tuple[str, ...], Trace] = field(default_factory=dict)

    def trace(self, layers: range) -> Trace:
        """The trace of a run of layers."""
        counts = Counter(_kind(self.job.model.config.layers()[i]) for i in layers)
        first, last = layers.start == 0, layers.stop == self.job.model.config.num_layers
        total = Trace()
        if first or last:
            kind = min(counts)
            counts[kind] -= 1
            total = self._of_kinds([kind], first, last)
        for kind, count in counts.items():
            total = total.plus(self._inner(kind), count) if count else total
        if len(layers) > 1 and self.job.layout.pp == 1:
            return self._prefetching(total, [kind for kind, count in counts.items() if count])
        return total

    def _prefetching(self, total: Trace, kinds: list[str]) -> Trace:
        """FSDP2 gathers a block's parameters while the one before it runs, which a single block
        does not show. (Stages of a pipeline keep theirs.)"""
        dtype = PRECISIONS[self.job.precision]
        share = dtype.itemsize / torch.promote_types(dtype, torch.float32).itemsize
        more = share * max(self._inner(kind).accumulated for kind in kinds)
        return dataclasses.replace(
            total, block_peak=total.block_peak + more, buffer_peak=total.buffer_peak + more
        )

    def _inner(self, kind: str) -> Trace:
        """What a layer of `kind` adds."""
        one = self._of_kinds([kind])
        if not _shares_modules(self.job.model.config):
            return one
        # Each trace has the modules that layers share.
        return self._of_kinds([kind, kind]).plus(one, -1)

    def _of_kinds(self, kinds: list[str], first: bool = False, last: bool = False) -> Trace:
        """The trace of layers of these kinds, at the start or end of a model or inside."""
        every = list(dict.fromkeys(_kind(spec) for spec in self.job.model.config.layers()))
        before, after = ([] if first else every), ([] if last else every)
        pattern = [*before, *kinds, *after]
        key = (*before, "", *kinds, "", *after)
        if key not in self.known:
            config = dataclasses.replace(
                self.job.model.config, num_layers=len(pattern), pattern=pattern
            )
            layers = range(len(before), len(before) + len(kinds))
            self.known[key] = trace_layers(self.job, config, layers)
        return self.known[key]


def trace_layers(job: Job, config: ModelConfig, layers: range) -> Trace:
    """The trace of `layers` of a model, all of them, laid out as a job says."""
    ends = layers.start > 0 and layers.stop == config.num_layers
    with fake_ranks(job.layout, pp=job.layout.pp - 1 if ends else 0) as ranks:
        experts = None
        if job.parallel.ep > 1:
            experts = expert_mesh(ranks.device.type, job.layout, job.parallel.ep)
        dtype = PRECISIONS[job.precision]
        part = build_part(config, layers, ranks, job.parallel, dtype, experts=experts)
        return fake_trace(part, ranks, job.inputs, job.make_optimizers, experts)


def _kind(spec: LayerSpec) -> str:
    return f"{spec.name}+{spec.ffn}"


def _shares_modules(config: ModelConfig) -> bool:
    return any(
        MIXERS[spec.mixer].shared_modules(config, make_options(spec.mixer, spec.options))
        or (spec.ffn != "none" and FFNS[spec.ffn].shared_modules(config))
        for spec in config.layers()
    )
