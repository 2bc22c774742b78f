"""torch's own engine: FSDP2, DTensor and torch's optimizers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from rondo.models import Decoder, ModelConfig
from rondo.parallel.bounds import keep_bounds
from rondo.parallel.build import ParallelModel
from rondo.parallel.checkpoint import copy_to_twins, optimizer_tensors
from rondo.parallel.config import ParallelConfig
from rondo.parallel.data_parallel import scale_gradients
from rondo.parallel.mesh import Ranks


@dataclass(frozen=True)
class Updates:
    """How an engine makes steps."""

    make_optimizers: Callable[[Sequence[Decoder]], list[Optimizer]]
    """Optimizers of this rank's parts of a model."""
    clip_norm: float
    """Largest 2-norm of the mean gradient; 0 does not clip."""
    micro_batch: int
    """Sequences of a micro-batch."""
    accumulation: int
    """Micro-batches that each rank adds up in a step."""


class NativeEngine(ParallelModel):
    """A model over ranks with its optimizers; arguments as of `ParallelModel`, and `updates`."""

    measures_gradients = True
    """Whether `gradient_norm_over` can be asked."""

    def __init__(
        self,
        config: ModelConfig,
        ranks: Ranks,
        parallel: ParallelConfig,
        updates: Updates,
        **options: Any,
    ) -> None:
        super().__init__(config, ranks, parallel, **options)
        self.clip_norm = updates.clip_norm
        self.optimizers = updates.make_optimizers(self.parts)

    def update(self, valid: float) -> float:
        """Divides the sums that `forward_backward` left by `valid`, the number of targets of all
        ranks, clips, makes a step with the optimizers' present rates, and clears the gradients.

        Returns:
            The 2-norm of the mean gradient before clipping, the same on every rank. Where it is
            not finite, nothing has changed.
        """
        norm = self.gradient_norm() / valid
        if math.isfinite(norm):
            shrink = self.clip_norm / norm if self.clip_norm and norm > self.clip_norm else 1.0
            scale_gradients(self.parts, shrink / valid)
            for optimizer in self.optimizers:
                optimizer.step()
            keep_bounds(self.parts)
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        return norm

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """State of the optimizers by name (`checkpoint.optimizer_tensors`). Collective."""
        return optimizer_tensors(self.parts, self.optimizers)

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """What a checkpoint holds, by part and name. Collective."""
        return {"model": self.model_tensors(), "optimizer": self.optimizer_tensors()}

    def take_in(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Goes on from what `tensors`, or some parts of it, have been filled with. Collective."""
        copy_to_twins(self.parts, self.optimizers)
