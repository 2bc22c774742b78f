"""Data parallel: parameters, gradients and optimizer state sharded over ranks with FSDP2."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._composable import checkpoint
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from rondo.models import Decoder, ModelConfig
from rondo.models.init import initial_values
from rondo.parallel.config import ParallelConfig
from rondo.parallel.mesh import Ranks

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def build_model(
    config: ModelConfig,
    ranks: Ranks,
    parallel: ParallelConfig,
    *,
    precision: str,
    seed: int,
    compile: bool = False,
) -> Decoder:
    """A sharded, initialised model: built on the meta device, checkpointed, compiled, sharded,
    then materialised and filled, so that no rank ever holds more than its part and one tensor.

    Parameters are float32 masters; blocks compute in `precision`. The initial values depend on
    `seed` alone, not on the layout.
    """
    with torch.device("meta"):
        model = Decoder(config)
    plan = list(model.named_parameters())
    model.activation_dtype = PRECISIONS[precision]
    for block in model.blocks:
        if parallel.activation_checkpointing == "full":
            checkpoint(block)
        if compile:
            block.compile()
    if ranks.mesh is not None:
        _shard(model, ranks, PRECISIONS[precision])
    model.to_empty(device=ranks.device)
    with torch.device("meta"):
        template = Decoder(config)
    if [name for name, _ in model.named_parameters()] != [name for name, _ in plan]:
        raise RuntimeError("sharding changed the parameters' names")
    fill(model, initial_values(template, seed))
    return model


@torch.no_grad()
def fill(model: nn.Module, values: Iterable[tuple[str, Tensor]]) -> None:
    """Copies full tensors into a model's (possibly sharded) parameters, without communication."""
    params = dict(model.named_parameters())
    for name, value in values:
        param = params[name]
        if isinstance(param, DTensor):
            value = value.to(param.device)
            value = distribute_tensor(
                value, param.device_mesh, param.placements, src_data_rank=None
            )
        param.copy_(value)


def _shard(model: Decoder, ranks: Ranks, dtype: torch.dtype) -> None:
    names = model.float32_names()
    replicated = {param for name, param in model.named_parameters() if name in names}
    policy = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for module in [*model.blocks, model]:
        sharded = fully_shard(module, mesh=ranks.mesh, mp_policy=policy, ignored_params=replicated)
        # Losses are sums over tokens: gradients add up, and are divided by the global count.
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sum


def accumulate(model: nn.Module, last: bool) -> None:
    """Tells a sharded model whether the next backward pass is the last of the step: only then
    are gradients reduced over ranks."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
        model.set_is_last_backward(last)


def finish_gradients(model: nn.Module, ranks: Ranks) -> None:
    """Sums the gradients that sharding left to each rank (the float32 vectors), in one call."""
    if ranks.mesh is None:
        return
    grads = [
        p.grad for p in model.parameters() if not isinstance(p, DTensor) and p.grad is not None
    ]
    if not grads:
        return
    flat = torch.cat([grad.flatten() for grad in grads])
    dist.all_reduce(flat)
    torch._foreach_copy_(
        grads,
        [
            part.view_as(g)
            for part, g in zip(flat.split([g.numel() for g in grads]), grads, strict=True)
        ],
    )


def gradient_norm(model: nn.Module, ranks: Ranks) -> float:
    """The 2-norm of all gradients, the same on every rank; not finite if any gradient is not."""
    local, whole = [], []
    for param in model.parameters():
        if isinstance(param.grad, DTensor):
            local.append(param.grad.to_local())
        elif param.grad is not None:
            whole.append(param.grad)
    squares = [_square_sum(part) for part in (local, whole)]
    if ranks.mesh is None:
        return sum(squares) ** 0.5
    # Every rank of a shard group holds a part; replicas hold the same parts.
    replicas = ranks.mesh["dp_replicate"].size()
    return (ranks.sum(squares[0])[0] / replicas + squares[1]) ** 0.5


def _square_sum(grads: list[Tensor]) -> float:
    if not grads:
        return 0.0
    norms = torch.stack(torch._foreach_norm(grads))
    return float(norms.double().square().sum())


@torch.no_grad()
def scale_gradients(model: nn.Module, factor: float) -> None:
    """Multiplies every gradient in place."""
    grads = [
        p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad
        for p in model.parameters()
        if p.grad is not None
    ]
    torch._foreach_mul_(grads, factor)
