"""Expert parallel: the experts of each mixture divided among ranks that see different tokens.

A second view of the same ranks, `pp x dp_replicate x expert_shard x expert x tp`, splits the joint
dimension `dp_shard x cp`: neighbours in it hold different experts (`expert`), others the same ones
(`expert_shard`), of which FSDP2 shards the model's width. The rows of an expert go to the rank that
holds it and come back, by an all-to-all whose sizes are exchanged first (arXiv 2006.16668).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from rondo.errors import UserError
from rondo.kernels.expert_products import even_loads
from rondo.kernels.tiles import has_numbers
from rondo.models import Decoder
from rondo.models.ffn.dispatch import collect, route, spread, spread_choices
from rondo.models.ffn.experts import Experts
from rondo.parallel.collectives import all_to_all_rows
from rondo.parallel.mesh import EXPERT_SHARD, Layout, submesh
from rondo.parallel.tensor import compute_locally, distribute, placement


def expert_mesh(device_type: str, layout: Layout, ep: int) -> DeviceMesh:
    """The ranks of `layout` by the experts they hold. Collective."""
    sharded = layout.dp_shard * layout.cp
    if sharded % ep:
        raise ValueError(f"{ep} expert-parallel ranks do not divide dp_shard x cp = {sharded}")
    return init_device_mesh(
        device_type,
        (layout.pp, layout.dp_replicate, sharded // ep, ep, layout.tp),
        mesh_dim_names=("pp", "dp_replicate", EXPERT_SHARD, "expert", "tp"),
    )


def shard_experts(model: Decoder, mesh: DeviceMesh) -> None:
    """Divides the experts of `model` (on the meta device) over an `expert_mesh`, in place; their
    inner channels over its `tp` too."""
    pair = submesh(mesh, "expert", "tp")
    group = submesh(mesh, "expert").get_group()
    for module in list(model.modules()):
        if not isinstance(module, Experts):
            continue
        for name, word in module.sharding.items():
            distribute(
                module, name, pair, Shard(0), placement(word, module.get_parameter(name).ndim)
            )
        module.operator = _ExpertsOverRanks(module.operator, group)
        if pair.shape[1] == 1:  # else tensor parallel says so
            compute_locally(module)


def missing_torch() -> str | None:
    """What experts over ranks need of torch that this one has not: several meshes in one FSDP2
    unit."""
    from torch.distributed.fsdp._fully_shard import _fsdp_common as fsdp

    if hasattr(fsdp, "ShardPlacementResult"):
        return None
    return f"needs torch 2.13 or newer, this is {torch.__version__}"


def expert_placement(mesh: DeviceMesh) -> Callable[[Tensor], Any]:
    """For FSDP2, where a parameter is sharded: of the matrices that `shard_experts` divided, the
    model's width, over ranks that hold the same experts; None for others.

    They belong to their block's unit (torch 2.13): a unit of their own would gather inside what
    selective activation checkpointing recomputes, whose operators must be the same each time.
    """
    from torch.distributed.fsdp._fully_shard import _fsdp_common as fsdp

    if problem := missing_torch():
        raise UserError(f"parallel.ep: {problem}")
    ranks = submesh(mesh, "dp_replicate", EXPERT_SHARD)
    info = fsdp.HSDPMeshInfo(ranks, shard_mesh_dim=1, replicate_mesh_dim=0)

    def place(param: Tensor) -> Any:
        if not isinstance(param, DTensor):
            return None
        if "expert" not in (param.device_mesh.mesh_dim_names or ()):
            return None
        inner = param.placements[1]
        assert isinstance(inner, Shard), "inner channels are divided"
        width = param.ndim - 1 if inner.dim == param.ndim - 2 else param.ndim - 2
        return fsdp.ShardPlacementResult(Shard(width), info)

    return place


class _ExpertsOverRanks:
    """An operator of `Experts` where each rank holds the weights of consecutive experts."""

    def __init__(self, operator: Callable[..., Tensor], group: dist.ProcessGroup) -> None:
        self.operator, self.group = operator, group

    def __call__(
        self, x: Tensor, experts: Tensor, shares: Tensor, *weights: Tensor, drops: bool = False
    ) -> Tensor:
        ranks, here = dist.get_world_size(self.group), len(weights[0])
        where = route(experts, ranks * here, drops=drops)
        own = where.counts.view(ranks, here)
        theirs = torch.empty_like(own)  # [rank it comes from, expert of this rank]
        dist.all_to_all_single(theirs, own.contiguous(), group=self.group)
        if has_numbers():
            send, receive = own.sum(1).tolist(), theirs.sum(1).tolist()
        else:  # a plan: every rank gets as many
            send = receive = even_loads(experts.numel(), ranks)
        rows = all_to_all_rows(spread(x, where), send, receive, self.group)
        shares = all_to_all_rows(spread_choices(shares, where), send, receive, self.group)
        local = torch.arange(here, device=x.device).repeat(ranks)
        local = local.repeat_interleave(theirs.flatten(), output_size=len(rows))
        y = self.operator(rows, local[:, None], shares[:, None], *weights)
        return collect(all_to_all_rows(y, receive, send, self.group), where)
