"""DeepSpeed's ZeRO (arXiv 1910.02054) behind the interface of the native engine.

Every rank runs the whole model on its own sequences; DeepSpeed shares out optimizer state,
gradients and parameters. Parameters are float32 and are cast where they are used, as in a run of
one process, so that the same numbers come out as of FSDP2, within rounding.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rondo.errors import UserError
from rondo.models import Decoder, ModelConfig
from rondo.models.block import Block
from rondo.models.mixer import Mixer
from rondo.parallel.build import ParallelModel, part_losses
from rondo.parallel.config import ParallelConfig
from rondo.parallel.engines.deepspeed_config import deepspeed_config
from rondo.parallel.engines.native import NativeEngine, Updates
from rondo.parallel.mesh import Ranks
from rondo.parallel.pipeline import MicroBatch, Weigh


class DeepSpeedEngine(NativeEngine):
    """A whole model on every rank, run by DeepSpeed. Arguments are those of `NativeEngine`."""

    def __init__(
        self,
        config: ModelConfig,
        ranks: Ranks,
        parallel: ParallelConfig,
        updates: Updates,
        **options: Any,
    ) -> None:
        deepspeed = _prepare(ranks.device)
        from rondo.parallel.engines import disk, zero  # import DeepSpeed

        disk.check_reader(parallel.deepspeed)
        self._disk, self._tools = disk, zero
        self.world = ranks.layout.data_size
        self._config = deepspeed_config(
            parallel.deepspeed,
            micro_batch=updates.micro_batch,
            accumulation=updates.accumulation,
            ranks=self.world,
            clip_norm=updates.clip_norm,
        )
        self._stage: int = parallel.deepspeed.zero_stage
        # Nothing is divided from outside: parts are those of one process.
        alone = dataclasses.replace(ranks, mesh=None)
        ParallelModel.__init__(self, config, alone, parallel, **options)
        self.ranks = ranks
        self.optimizers = updates.make_optimizers(self.parts)
        losses = _Losses(self.parts[0])
        if self._stage == 3:
            deepspeed.utils.set_z3_leaf_modules(losses, [Block])  # gathers one block at a time
            self.parts[0].get_submodule("embedding").register_forward_hook(_ask_for_gradient)
            deepspeed.zero.register_external_parameter(losses, self.parts[0].output_weight)
        self._engine = deepspeed.initialize(
            model=losses,
            optimizer=self.optimizers[0],
            config=self._config,
            dist_init_required=False,
        )[0]
        self._zero = zero.ZeroTensors(
            self.parts[0], self._engine.optimizer, self.optimizers[0], ranks
        )
        self._scale = 1.0

    def _materialise(self, part: Decoder, values: Iterable[tuple[str, Tensor]]) -> None:
        if self._stage == 3:
            self._disk.check_locked_memory(part, self.world, self.parallel.deepspeed)
            place = self._config["zero_optimization"]["offload_param"]
            if place["device"] == "nvme":
                # Else 2 GB a rank, in five buffers, which are too few for blocks of more matrices.
                place |= self._disk.read_buffers(part, self.world) | place
            self._tools.materialise_shared(part, values, self.ranks.device, self._config)
        else:
            super()._materialise(part, values)

    def forward_backward(self, batches: Sequence[MicroBatch], weigh: Weigh | None = None) -> Tensor:
        """As of the native engine, except that DeepSpeed holds the gradients already divided by
        the number of targets: its own clipping is of the mean."""
        valid = self.ranks.sum(sum(float((batch.targets >= 0).sum()) for batch in batches))[0]
        self._scale = self.world / max(1.0, valid)  # DeepSpeed takes the mean over ranks
        return super().forward_backward(batches, weigh)

    def update(self, valid: float) -> float:
        """As of the native engine; `valid` has been counted in `forward_backward`."""
        self._engine.step()
        if self._engine.optimizer.overflow:
            return float("inf")
        self._keep_bounds()
        return float(self._engine.get_global_grad_norm())

    def gradient_norm_over(
        self, batches: Sequence[MicroBatch], chosen: Callable[[str], bool]
    ) -> float:
        """As of the native engine. What DeepSpeed gets is not finite, so that it drops the step."""
        trained = {n: p for n, p in self.parts[0].named_parameters() if p.requires_grad}
        sums = {name: self._zero.zeros(p) for name, p in trained.items() if chosen(name)}
        if not sums:
            return 0.0

        def keep(name: str, gradient: Tensor) -> Tensor:
            if name in sums:
                sums[name] += gradient
            return torch.full_like(gradient, torch.nan)

        hooks = [param.register_hook(partial(keep, name)) for name, param in trained.items()]
        self.forward_backward(batches)
        for hook in hooks:
            hook.remove()
        with _silence():  # it would warn of what is meant
            self._engine.step()
        total = torch.cat([each.flatten() for each in sums.values()])
        dist.all_reduce(total)
        return float(total.norm()) / self._scale

    def train(self) -> None:
        self._engine.train()

    def eval(self) -> None:
        self._engine.eval()

    def model_tensors(self) -> dict[str, Tensor]:
        return self._zero.model()

    def optimizer_tensors(self) -> dict[str, Tensor]:
        return self._zero.optimizer()

    def take_in(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        self._zero.take_in(tensors)

    def _losses(self, batch: MicroBatch, reduction: str) -> Tensor:
        losses, self._aux = self._engine(batch, reduction)
        return losses

    def _accumulate(self, last: bool) -> None:
        self._engine.set_gradient_accumulation_boundary(last)

    def _backward(self, loss: Tensor) -> None:
        self._engine.backward(loss * self._scale, scale_wrt_gas=False)

    def _finish_gradients(self) -> None:
        pass  # DeepSpeed has summed them all

    @torch.no_grad()
    def _keep_bounds(self) -> None:
        for prefix, mixer in self.parts[0].named_modules():
            if isinstance(mixer, Mixer):
                for name, bound in mixer.bounds().items():
                    self._zero.clamp(f"{prefix}.{name}", bound)


class _Losses(nn.Module):
    """A model and its loss in one forward pass, which is what DeepSpeed wraps."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, batch: MicroBatch, reduction: str) -> tuple[Tensor, dict[str, Tensor]]:
        return part_losses(self.decoder, batch, reduction)


def _ask_for_gradient(module: nn.Module, inputs: object, output: Tensor) -> None:
    """ZeRO 3 takes a block's gradients when that of its input is there, and at once where its
    input wants none: behind a frozen embedding (LoRA) before they are computed."""
    if torch.is_grad_enabled():
        output.requires_grad_()


def _prepare(device: torch.device) -> Any:
    """DeepSpeed, quiet, on this device and in the process group that is there."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    os.environ.setdefault("LOCAL_RANK", "0")  # of a process that no launcher started
    try:
        import deepspeed
        import deepspeed.ops
        from deepspeed.utils import logger
    except ImportError as error:
        raise UserError(f"parallel.engine: deepspeed cannot be imported: {error}") from None
    logger.setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".torch.distributed.[a-z_]+. is deprecated")
    # On CPUs it would compile collectives of its own for half a minute; gloo has them.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_init_required=False)
    return deepspeed


@contextmanager
def _silence() -> Iterator[None]:
    """Keeps DeepSpeed's warnings back."""
    from deepspeed.utils import logger

    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
