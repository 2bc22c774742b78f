"""Megatron-Core's data parallel behind the interface of the native engine.

Its DistributedDataParallel keeps the gradients of a rank in buffers, cut into buckets that are
reduced and scattered over data ranks, in float32; its distributed optimizer updates each rank's
share of every bucket with AdamW and gathers the parameters (arXiv 1910.02054). In bfloat16, what
passes use is bfloat16 and what is updated is a float32 copy of the share.
"""

from __future__ import annotations

import contextlib
import functools
import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rondo.errors import UserError
from rondo.models import Decoder, ModelConfig
from rondo.parallel.bounds import keep_bounds
from rondo.parallel.build import ParallelModel
from rondo.parallel.config import MegatronOptions, ParallelConfig
from rondo.parallel.engines.megatron_tensors import MegatronTensors, Split
from rondo.parallel.engines.native import NativeEngine, Updates
from rondo.parallel.mesh import DATA, Ranks
from rondo.parallel.tensor import replicated

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of fused kernels that are not there
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
    )
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
    from megatron.core.transformer import TransformerConfig


class MegatronEngine(NativeEngine):
    """A model, or its tensor-parallel part, on every data rank, stepped by Megatron's distributed
    optimizer. Arguments are those of `NativeEngine`; raises UserError on a device that Megatron
    does not know."""

    measures_gradients = False  # they are in Megatron's buffers

    def __init__(
        self,
        config: ModelConfig,
        ranks: Ranks,
        parallel: ParallelConfig,
        updates: Updates,
        **options: Any,
    ) -> None:
        self._check_device(ranks.device)
        warnings.filterwarnings("ignore", message=".torch.distributed.[a-z_]+. is deprecated")
        ParallelModel.__init__(self, config, ranks, parallel, **options)
        self.clip_norm = updates.clip_norm
        part = self.parts[0]
        splits, self._shared = _use_plain_parameters(part)
        exact = _cast(part)
        self.optimizers = updates.make_optimizers(self.parts)
        groups = _groups(ranks)
        self._overlap = parallel.megatron.overlap_param_gather
        self._ddp = _data_parallel(part, parallel.megatron, groups)
        if self._overlap:
            _gather_before_use(part, self._ddp)
        self._optimizer = _optimizer(self.optimizers[0], self._ddp, updates.clip_norm, groups)
        self._tensors = MegatronTensors(part, self._optimizer, ranks, splits, exact)
        self._last = True

    @staticmethod
    def _check_device(device: torch.device) -> None:
        if device.type != "cuda":
            raise UserError(
                "parallel.megatron.distributed_optimizer: Megatron keeps its buffers on CUDA "
                f"devices alone, and this run is on {device.type}; use false, or "
                "parallel.engine native"
            )

    def update(self, valid: float) -> float:
        """As of the native engine, with Megatron's clipping and update."""
        self._ddp.scale_gradients(1.0 / valid)
        optimizer = self._optimizer
        optimizer.prepare_grads()
        clip = self.clip_norm
        norm = float(optimizer.clip_grad_norm(clip) if clip else optimizer.get_grad_norm())
        if math.isfinite(norm):
            optimizer.step_with_ready_grads()
            self._keep_bounds()
        self._ddp.zero_grad_buffer()
        optimizer.zero_grad()
        return norm

    def model_tensors(self) -> dict[str, Tensor]:
        self._gather()
        return self._tensors.model()

    def optimizer_tensors(self) -> dict[str, Tensor]:
        return self._tensors.optimizer()

    def take_in(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        self._tensors.take_in(tensors)

    def _accumulate(self, last: bool) -> None:
        self._last = last

    def _backward(self, loss: Tensor) -> None:
        with contextlib.nullcontext() if self._last else self._ddp.no_sync():
            loss.backward()

    @torch.no_grad()
    def _finish_gradients(self) -> None:
        self._ddp.finish_grad_sync()
        if self._shared:
            # Of a bucket only this rank's share is a sum over data ranks; the rest is not used.
            grads: list[Tensor] = [param.main_grad for param in self._shared]
            flat = torch.cat([grad.flatten() for grad in grads])
            dist.all_reduce(flat, group=self.ranks.group("tp"))
            pieces = flat.split([grad.numel() for grad in grads])
            torch._foreach_copy_(grads, [p.view_as(g) for p, g in zip(pieces, grads, strict=True)])

    def _keep_bounds(self) -> None:
        keep_bounds(self.parts)
        self._tensors.keep_bounds()

    def _gather(self) -> None:
        """Waits for parameters that are to be gathered with the next forward pass."""
        if self._overlap:
            for group in self._ddp.bucket_groups:
                group.finish_param_sync()


def _use_plain_parameters(part: Decoder) -> tuple[dict[str, Split], list[Any]]:
    """Puts this rank's part of each DTensor in its place, which is what Megatron's buffers take.
    Returns how they are divided, by name, and those that tensor-parallel ranks hold alike, each
    with a share of the gradient."""
    splits: dict[str, Split] = {}
    shared: list[Any] = []
    for name, param in list(part.named_parameters()):
        if not isinstance(param, DTensor):
            continue
        owner, _, leaf = name.rpartition(".")
        local: Any = nn.Parameter(
            param.detach().to_local().clone(), requires_grad=param.requires_grad
        )
        setattr(part.get_submodule(owner), leaf, local)
        placement = param.placements[0]
        splits[name] = Split(param.device_mesh, placement, param.shape, param.stride())
        if replicated(param):
            shared += [local] if param.requires_grad else []
        else:
            set_tensor_model_parallel_attributes(local, True, getattr(placement, "dim", 0), 1)
    return splits, shared


def _cast(part: Decoder) -> dict[str, Tensor]:
    """Casts what is trained to the type of activations, except what is never cast; returns the
    values before, in host memory, by name."""
    exact: dict[str, Tensor] = {}
    for name, param in part.named_parameters():
        casts = param.dtype != part.activation_dtype and name not in part.float32_names()
        if param.requires_grad and casts:
            exact[name] = param.detach().cpu()
            param.data = param.detach().to(part.activation_dtype)
    return exact


def _groups(ranks: Ranks) -> ProcessGroupCollection:
    """This run's groups by Megatron's names; those of experts and of a pipeline have one rank."""
    groups = ProcessGroupCollection()
    groups.dp = groups.dp_cp = ranks.group(DATA)
    groups.tp = ranks.group("tp")
    groups.pp = groups.ep = groups.expt_dp = ranks.group("pp")
    return groups


def _data_parallel(
    part: Decoder, options: MegatronOptions, groups: ProcessGroupCollection
) -> DistributedDataParallel:
    model = TransformerConfig(
        num_layers=len(part.layers),
        hidden_size=part.config.dim,
        num_attention_heads=1,
        calculate_per_token_loss=True,  # gradients add up: the division is by all targets
    )
    buckets = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=options.overlap_grad_reduce,
        overlap_param_gather=options.overlap_param_gather,
        use_distributed_optimizer=True,
        bucket_size=options.bucket_size,
    )
    return DistributedDataParallel(model, buckets, part, pg_collection=groups)


def _optimizer(
    adamw: torch.optim.Optimizer,
    ddp: DistributedDataParallel,
    clip_norm: float,
    groups: ProcessGroupCollection,
) -> DistributedOptimizer:
    """Megatron's optimizer around `adamw`, whose groups then hold this rank's shares."""
    config = OptimizerConfig(
        optimizer="adam",
        bf16=any(param.dtype == torch.bfloat16 for param in ddp.parameters()),
        use_distributed_optimizer=True,
        overlap_param_gather=ddp.ddp_config.overlap_param_gather,
        clip_grad=clip_norm,
    )
    optimizer = DistributedOptimizer(
        adamw,
        config,
        grad_scaler=None,
        init_state_fn=None,
        model_chunks=[ddp],
        per_model_buffers={0: ddp.buffers},
        data_parallel_group=groups.dp,
        data_parallel_group_gloo=None,
        data_parallel_group_idx=groups.tp.rank(),
        distributed_optimizer_instance_id=0,
    )
    optimizer.grad_stats_parallel_group = dist.group.WORLD
    optimizer.tp_group = groups.tp
    return optimizer


def _gather_before_use(part: Decoder, ddp: DistributedDataParallel) -> None:
    """Waits for all parameters of a block before it runs, and for those outside of blocks before
    the model does: Megatron's own hooks wait for those of a module when that module is called,
    and some are used by others."""
    inside = {param for block in part.blocks.values() for param in block.parameters()}
    outside = [param for param in part.parameters() if param not in inside]
    part.register_forward_pre_hook(functools.partial(_wait, ddp, outside))
    for block in part.blocks.values():
        block.register_forward_pre_hook(functools.partial(_wait, ddp, list(block.parameters())))


def _wait(ddp: DistributedDataParallel, params: list[nn.Parameter], *_: Any) -> None:
    for param in params:
        if param in ddp.param_to_bucket_group:
            ddp.param_to_bucket_group[param].finish_param_sync()
