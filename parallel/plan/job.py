"""What is to be laid out."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch

from rondo.models import Decoder, ModelConfig
from rondo.models.ffn.experts import Experts
from rondo.parallel.config import ParallelConfig
from rondo.parallel.mesh import Layout, layout
from rondo.parallel.pipeline import layer_flops, split_evenly, stage_count
from rondo.parallel.plan.trace import MakeOptimizers
from rondo.parallel.sequence import has_chain


@dataclass(frozen=True, eq=False)
class Model:
    """A model that runs on sequences of `length` tokens, and what it costs; shared by all layouts
    of it, since to build one takes a while even without memory."""

    config: ModelConfig
    length: int

    @functools.cached_property
    def _whole(self) -> Decoder:
        with torch.device("meta"):
            return Decoder(self.config)

    @functools.cached_property
    def parameters(self) -> int:
        """Of the whole model."""
        return self._whole.cost(self.length).parameters

    @functools.cached_property
    def flops(self) -> float:
        """Of a forward pass, a token."""
        return self._whole.cost(self.length).flops

    @functools.cached_property
    def expert_widths(self) -> set[int]:
        """Inner channels of the experts of mixtures."""
        found = (m for m in self._whole.modules() if isinstance(m, Experts))
        return {experts.gate_up_proj.shape[2] for experts in found}

    @functools.cached_property
    def state_bytes(self) -> int:
        """Of one sequence's recurrent states and key/value caches, in a bfloat16 run."""
        return self._whole.cost(self.length).state_bytes

    @functools.cached_property
    def layer_flops(self) -> list[tuple[float, float]]:
        """Of each layer's forward pass, a token; and how many of them are not products with
        weights."""
        blocks: Any = self._whole.blocks.values()
        return [(b.cost(self.length).flops, b.mixer.operator_flops(self.length)) for b in blocks]

    @functools.cached_property
    def chains(self) -> list[list[tuple[float, int]]]:
        """Of each layer the operators whose state goes from rank to rank of `cp`: FLOPs of the
        forward pass, a token, and heads."""
        blocks: Any = self._whole.blocks.values()
        return [
            [(m.operator_flops(self.length), m.num_heads) for m in block.modules() if has_chain(m)]
            for block in blocks
        ]

    @functools.cache  # noqa: B019 - a model lives as long as its plans
    def stages(self, pp: int, schedule: str) -> list[range]:
        """The layers of each stage of a pipeline."""
        return split_evenly(layer_flops(self.config, self.length), stage_count(pp, schedule))


@dataclass(frozen=True)
class Job:
    """A model, a batch, and how both are divided over ranks."""

    model: Model
    parallel: ParallelConfig
    ranks: int
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

    @property
    def tokens(self) -> int:
        """Tokens in a step, over all ranks."""
        return self.global_batch * self.model.length

    @property
    def inputs(self) -> tuple[int, int]:
        """Sequences of a micro-batch, and tokens of each on a rank."""
        return self.micro_batch, self.model.length // self.parallel.cp

    @property
    def stages(self) -> list[range]:
        """The layers of each stage of the pipeline."""
        return self.model.stages(self.parallel.pp, self.parallel.pipeline_schedule)
