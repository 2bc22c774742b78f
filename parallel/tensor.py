"""Tensor parallel: heads, inner channels and the vocabulary divided among ranks.

Each parameter becomes a DTensor as its module's `sharding` words say (arXiv 1909.08053), and each
module then computes with its local part as if it were all there is. Between mixers and channel
mixers the residual stream and its norms are divided along the sequence (arXiv 2205.05198): a
mixer's input is gathered along time, its output, a sum over ranks, is reduced and scattered.

Inside a mixer every gradient is one rank's share of a sum. What is split is whole by itself; of
what is replicated, `finish_gradients` sums the shares once a step.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from rondo.errors import UserError
from rondo.models import Decoder
from rondo.models.layers import GatedRMSNorm, RMSNorm
from rondo.models.mixer import ChannelMixer, Mixer
from rondo.parallel.collectives import all_reduce, gather_time, scatter_time, slice_time
from rondo.parallel.vocabulary import Vocabulary

_DIVIDED = {"column": -2, "row": -1, "head": 0}
"""Dimension that each word divides; matrices `(outputs, inputs)` may be stacked."""


def placement(word: str, ndim: int) -> Placement:
    """How a parameter of `ndim` dimensions is laid out over ranks, by its `sharding` word."""
    if word == "replicate":
        return Replicate()
    return Shard(_DIVIDED[word] % ndim if ndim > 1 else 0)


def sharding_word(module: Mixer | ChannelMixer, name: str) -> str:
    """What `module` says of its parameter `name`, by itself or by the part it belongs to."""
    while name not in module.sharding and "." in name:
        name = name.rpartition(".")[0]
    return module.sharding[name]


def shard_tensors(model: Decoder, mesh: DeviceMesh) -> None:
    """Divides `model` (on the meta device) over the one-dimensional `mesh`, in place."""
    group, size = mesh.get_group(), mesh.size()
    set_first_heads(model, mesh)
    for module in outermost(model):
        shard_module(module, mesh)
        module.register_forward_pre_hook(functools.partial(_gather_inputs, group))
        module.register_forward_hook(functools.partial(_scatter_outputs, group))
    vocabulary = Vocabulary(model.config.vocab_size, group)
    if vocabulary.size <= (size - 1) * -(-vocabulary.size // size):
        raise UserError(f"parallel.tp: {size} ranks are too many for {vocabulary.size} token ids")
    model.cross_entropy = vocabulary.cross_entropy
    if model.embedding is not None:
        model.embedding.operator = vocabulary.look_up
        distribute(model.embedding, "weight", mesh, Shard(0))
    if model.head is not None:
        distribute(model.head, "weight", mesh, Shard(0))
    for module in model.modules():
        for name, param in list(module.named_parameters(recurse=False)):
            if not isinstance(param, DTensor):
                distribute(module, name, mesh, Replicate())
        if next(module.parameters(recurse=False), None) is not None:
            compute_locally(module)


def set_first_heads(model: nn.Module, mesh: DeviceMesh) -> None:
    """Tells every mixer which of its heads this rank has first."""
    for module in model.modules():
        if isinstance(module, Mixer):
            heads = next(iter(module.heads(module.config, module.options).values()))
            module.first_head = mesh.get_local_rank() * (heads // mesh.size())


def outermost(model: nn.Module) -> Iterator[Mixer | ChannelMixer]:
    """The mixers of `model` that are not parts of other mixers."""
    for child in model.children():
        if isinstance(child, Mixer | ChannelMixer):
            yield child
        else:
            yield from outermost(child)


def compute_locally(module: nn.Module) -> None:
    """Lets `module` compute with this rank's parts of its own parameters."""
    module.register_forward_pre_hook(_use_local_parameters)
    module.register_forward_hook(_restore_parameters, always_call=True)


def replicated(param: Tensor) -> bool:
    """Whether tensor-parallel ranks hold the same `param`, each with a share of its gradient."""
    if not isinstance(param, DTensor):
        return False
    names = param.device_mesh.mesh_dim_names or ()
    return "tp" in names and param.placements[names.index("tp")].is_replicate()


def shard_module(module: Mixer | ChannelMixer, mesh: DeviceMesh) -> None:
    """Divides the parameters of a mixer as its words say, and its norms over all heads."""
    for name, param in list(module.named_parameters()):
        word = sharding_word(module, name)
        owner, _, leaf = name.rpartition(".")
        holder = module.get_submodule(owner)
        if word == "row" and param.ndim == 1:
            raise ValueError(f"{type(module).__name__}.{name}: a row-split layer has no bias")
        # A norm over all heads spans ranks; one that has its own groups of channels does not.
        norm = isinstance(holder, RMSNorm | GatedRMSNorm) and holder.width == param.numel()
        if norm and word == "head":
            operator = _rms_norm if isinstance(holder, RMSNorm) else _gated_rms_norm
            object.__setattr__(holder, "operator", functools.partial(operator, mesh.get_group()))
        if not isinstance(param, DTensor):
            distribute(holder, leaf, mesh, placement(word, param.ndim))


def distribute(module: nn.Module, name: str, mesh: DeviceMesh, *placements: Placement) -> None:
    param = module.get_parameter(name)
    sharded = distribute_tensor(param.detach(), mesh, placements, src_data_rank=None)
    setattr(module, name, nn.Parameter(sharded, requires_grad=param.requires_grad))


def _gather_inputs(group: dist.ProcessGroup, module: nn.Module, args: tuple[Any, ...]) -> Any:
    x, *others = args
    if isinstance(module, ChannelMixer) and others:  # what crosses layers
        carry = {name: gather_time(value, group) for name, value in others[0].items()}
        others = [carry, *others[1:]]
    return (gather_time(x, group), *others)


def _scatter_outputs(
    group: dist.ProcessGroup, module: Mixer | ChannelMixer, args: tuple[Any, ...], output: Any
) -> Any:
    # What is split by input adds up over ranks; without it all ranks have the same output.
    scatter = scatter_time if "row" in module.sharding.values() else slice_time
    if isinstance(output, Tensor):
        return scatter(output, group)
    y, after = output
    if isinstance(module, ChannelMixer):
        after = {name: slice_time(value, group) for name, value in after.items()}
    return scatter(y, group), after


def _use_local_parameters(module: nn.Module, args: Any) -> None:
    """Puts this rank's part of each parameter before the parameter itself, while it computes."""
    for name, param in module.named_parameters(recurse=False):
        if isinstance(param, DTensor):
            module.__dict__[name] = param.to_local()


def _restore_parameters(module: nn.Module, args: Any, output: Any) -> None:
    for name in module._parameters:
        module.__dict__.pop(name, None)


def _rms_norm(group: dist.ProcessGroup, x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """RMSNorm whose channels are divided among ranks."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    squares = all_reduce(wide.square().sum(-1, keepdim=True), group)
    channels = x.shape[-1] * dist.get_world_size(group)
    return (wide * (squares / channels + eps).rsqrt() * weight).to(x.dtype)


def _gated_rms_norm(
    group: dist.ProcessGroup,
    x: Tensor,
    gate: Tensor,
    weight: Tensor,
    *,
    eps: float,
    norm_before_gate: bool,
) -> Tensor:
    """Gated RMSNorm whose channels are divided among ranks."""
    kind = torch.promote_types(x.dtype, torch.float32)
    wide, gate = x.to(kind), nn.functional.silu(gate.to(kind))
    if norm_before_gate:
        return (_rms_norm(group, wide, weight, eps=eps) * gate).to(x.dtype)
    return _rms_norm(group, wide * gate, weight, eps=eps).to(x.dtype)
