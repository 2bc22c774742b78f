"""Data parallel: parameters, gradients and optimizer state sharded over ranks with FSDP2.

Sequence-parallel ranks count as data-parallel ones here: each sees other tokens of the same model.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Placement
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from rondo.models import Decoder
from rondo.parallel.expert import expert_placement
from rondo.parallel.mesh import DATA, EXPERT_SHARD, SHARDED, Ranks, submesh
from rondo.parallel.tensor import replicated


def shard_parameters(
    model: Decoder, mesh: DeviceMesh, dtype: torch.dtype, experts: DeviceMesh | None = None
) -> None:
    """Shards each block and the rest over the mesh, in place; blocks compute in `dtype`. Stages of
    a pipeline stay whole from a step's first micro-batch to its last. With an expert mesh, what
    `shard_experts` left to each rank is sharded over the ranks that hold the same experts."""
    names = model.float32_names()
    whole = {param for name, param in model.named_parameters() if name in names}
    policy = MixedPrecisionPolicy(
        param_dtype=dtype,
        reduce_dtype=torch.promote_types(dtype, torch.float32),
        cast_forward_inputs=False,
    )
    ranks = submesh(mesh, "dp_replicate", SHARDED)
    placement = None if experts is None else expert_placement(experts)
    # Blocks hand on what they do not use; nothing is changed in place there.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    for module in [*model.blocks.values(), model]:
        sharded = fully_shard(
            module,
            mesh=ranks,
            shard_placement_fn=placement,
            mp_policy=policy,
            ignored_params=whole,
            reshard_after_forward=False if mesh.shape[0] > 1 else None,
        )
        # Losses are sums over tokens: gradients add up, and are divided by the global count.
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sum


@torch.no_grad()
def fill(model: nn.Module, values: Iterable[tuple[str, Tensor]]) -> None:
    """Copies full tensors into a model's (possibly sharded) parameters, without communication."""
    params = dict(model.named_parameters())
    for name, value in values:
        param = params[name]
        if isinstance(param, DTensor):
            part = local_part(value, param.device_mesh, param.placements)
            param.to_local().copy_(part)
        else:
            param.copy_(value)


def local_part(whole: Tensor, mesh: DeviceMesh, placements: tuple[Placement, ...]) -> Tensor:
    """What this rank holds of `whole` when it is laid out so; a view, without communication."""
    with unset_fake_temporarily():  # a plan has fake tensors, but torch reads offsets from one
        sizes, offsets = compute_local_shape_and_global_offset(whole.shape, mesh, placements)
    return whole[tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))]


def finish_gradients(parts: list[Decoder], ranks: Ranks) -> None:
    """Completes the gradients of a step with what FSDP2 leaves out: it sums the float32 vectors
    over data-parallel ranks, what tensor-parallel ranks hold alike over these, and what stages of
    a pipeline hold alike over stages."""
    if ranks.mesh is None:
        return
    params = [param for part in parts for param in part.parameters() if param.requires_grad]
    _sum([p for p in params if not _by_fsdp(p)], ranks.group(DATA))
    if ranks.layout.tp > 1:
        _sum([p for p in params if replicated(p)], ranks.group("tp"))
    if ranks.layout.pp > 1:
        _sum_shared_modules(parts, ranks.group("pp"))
        _sum_tied_embedding(parts, ranks)


def local_gradient(param: nn.Parameter) -> Tensor:
    """This rank's part of a gradient; zeros are made where there is none."""
    if param.grad is None:
        param.grad = torch.zeros_like(param)
    return param.grad.to_local() if isinstance(param.grad, DTensor) else param.grad


def _by_fsdp(param: Tensor) -> bool:
    if not isinstance(param, DTensor):
        return False
    return bool({SHARDED, EXPERT_SHARD} & {*(param.device_mesh.mesh_dim_names or ())})


def _sum(params: list[nn.Parameter], group: dist.ProcessGroup) -> None:
    """Sums local gradients over ranks, in one call."""
    grads = [local_gradient(p) for p in params]
    if grads:
        flat = torch.cat([grad.flatten() for grad in grads])
        dist.all_reduce(flat, group=group)
        _spread(flat, grads)


def _spread(flat: Tensor, grads: list[Tensor]) -> None:
    pieces = flat.split([grad.numel() for grad in grads])
    torch._foreach_copy_(grads, [p.view_as(g) for p, g in zip(pieces, grads, strict=True)])


def _sum_shared_modules(parts: list[Decoder], group: dist.ProcessGroup) -> None:
    """Every part has all modules that mixers share across layers."""
    grads = [
        [local_gradient(p) for p in part.shared.parameters() if p.requires_grad] for part in parts
    ]
    if not grads[0]:
        return
    flat = torch.stack([torch.cat([g.flatten() for g in own]) for own in grads]).sum(0)
    dist.all_reduce(flat, group=group)
    for own in grads:
        _spread(flat, own)


def _sum_tied_embedding(parts: list[Decoder], ranks: Ranks) -> None:
    """The first and the last part hold the embedding if it is tied."""
    held = [part.embedding.weight for part in parts if part.embedding is not None]
    held = [weight for weight in held if weight.requires_grad]
    if not parts[0].config.tie_embeddings or not held:
        return
    grads = [local_gradient(weight) for weight in held]
    group = ranks.group("pp")
    other = dist.get_global_rank(group, ranks.layout.pp - 1 - ranks.index("pp"))
    theirs = torch.empty_like(grads[0])
    swap = [
        dist.P2POp(dist.isend, grads[0].contiguous(), other, group),
        dist.P2POp(dist.irecv, theirs, other, group),
    ]
    for work in dist.batch_isend_irecv(swap):
        work.wait()
    grads[0].add_(theirs)


def gradient_norm(
    parts: list[Decoder],
    ranks: Ranks,
    stages: int = 1,
    chosen: Callable[[str], bool] = lambda name: True,
) -> float:
    """The 2-norm of the gradients of all parameters, or of those whose names are `chosen`; the same
    on every rank, not finite if any gradient is not.

    Each rank adds its parts' squares, divided by the number of ranks and of the `stages` of the
    pipeline that hold the same.
    """
    total = 0.0
    for part in parts:
        by_copies: dict[int, list[Tensor]] = {}
        for name, param in part.named_parameters():
            if param.grad is not None and chosen(name):
                copies = _copies(param, ranks) * _stages_with(name, part, stages)
                by_copies.setdefault(copies, []).append(local_gradient(param))
        total += sum(_square_sum(grads) / copies for copies, grads in by_copies.items())
    return ranks.sum(total)[0] ** 0.5


def _copies(param: Tensor, ranks: Ranks) -> int:
    """How many ranks of a stage hold the same part of `param`."""
    copies = ranks.layout.size // ranks.layout.pp
    if isinstance(param, DTensor):
        for placement, size in zip(param.placements, param.device_mesh.shape, strict=True):
            copies //= 1 if placement.is_replicate() else size
    return copies


def _stages_with(name: str, part: Decoder, stages: int) -> int:
    if name.startswith("shared."):
        return stages
    tied = name.startswith("embedding.") and part.config.tie_embeddings
    return 2 if tied and stages > 1 else 1


def _square_sum(grads: list[Tensor]) -> float:
    norms = torch.stack(torch._foreach_norm(grads))
    return float(norms.double().square().sum())


@torch.no_grad()
def scale_gradients(parts: Iterable[nn.Module], factor: float) -> None:
    """Multiplies every gradient in place."""
    params = [param for part in parts for param in part.parameters() if param.grad is not None]
    torch._foreach_mul_([local_gradient(param) for param in params], factor)
