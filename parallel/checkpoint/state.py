"""The tensors of a training run by name, and a digest of them."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rondo.parallel.checkpoint.collective import CheckpointError
from rondo.parallel.checkpoint.staging import Tensors

_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")


def model_tensors(parts: Sequence[nn.Module]) -> dict[str, Tensor]:
    """Parameters and persistent buffers of this rank's parts of a model by name; the tensors
    themselves, not copies. What several parts hold alike is the first one's (`copy_to_twins`).

    A tensor with several names comes once, under the first. Names do not depend on torch.compile
    or activation checkpointing. Under FSDP2 this brings parameters back to their sharded form.
    """
    tensors: dict[str, Tensor] = {}
    for part in parts:
        for name, tensor in _named_tensors(part):
            tensors.setdefault(name, tensor)
    return tensors


def _named_tensors(part: nn.Module) -> Iterator[tuple[str, Tensor]]:
    seen: set[int] = set()
    for name, tensor in part.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            for wrapper in _WRAPPERS:
                name = name.replace(wrapper, "")
            yield name, tensor


def optimizer_tensors(
    parts: Sequence[nn.Module], optimizers: Iterable[torch.optim.Optimizer]
) -> dict[str, Tensor]:
    """State of all optimizers as `<parameter>.<key>` ("head.weight.exp_avg", "...step").

    These are the tensors themselves: filling them restores the optimizers. State that does not
    exist yet is made (zero, as before the first step), so that there is something to fill.
    Learning rates and the like are not state; they follow from recipe and step.
    """
    first = {id(tensor) for tensor in model_tensors(parts).values()}
    names = {id(tensor): name for part in parts for name, tensor in _named_tensors(part)}
    tensors: dict[str, Tensor] = {}
    for optimizer in optimizers:
        _ensure_state(optimizer)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if id(parameter) not in names:
                    raise CheckpointError(
                        f"{type(optimizer).__name__} updates a parameter of shape "
                        f"{tuple(parameter.shape)} that is not the model's"
                    )
                if id(parameter) not in first:
                    continue
                for key, value in optimizer.state[parameter].items():
                    name = f"{names[id(parameter)]}.{key}"
                    if not isinstance(value, Tensor):
                        raise CheckpointError(f"{name} is a {type(value)}, expected a Tensor")
                    tensors[name] = value
    return tensors


@torch.no_grad()
def copy_to_twins(parts: Sequence[nn.Module], optimizers: Iterable[torch.optim.Optimizer]) -> None:
    """Copies what `model_tensors` and `optimizer_tensors` give to its twins in other parts of
    this rank: after loading, stages that hold the same parameter must agree."""
    first = model_tensors(parts)
    states = [optimizer.state for optimizer in optimizers]
    for part in parts[1:]:
        for name, tensor in _named_tensors(part):
            if tensor is first[name]:
                continue
            tensor.copy_(first[name])
            for state in states:
                for key, value in state.get(first[name], {}).items():
                    state[tensor][key].copy_(value)


@torch.no_grad()
def state_digest(tensors: Tensors) -> str:
    """SHA-256 over the names, types, shapes and bytes of whole tensors, as hex.

    The same for equal values under any layout, and on every rank. Gathers one DTensor at a time;
    all ranks must call it.
    """
    digests: dict[str, str] = {}
    for part in sorted(tensors):
        for name, tensor in sorted(tensors[part].items()):
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            flat = whole.detach().cpu().contiguous().reshape(-1)
            digest = hashlib.sha256(flat.view(torch.uint8).numpy().data).hexdigest()
            digests[f"{part}/{name} {whole.dtype} {tuple(whole.shape)}"] = digest
    if dist.is_initialized():  # stages of a pipeline hold different tensors
        of_ranks: list[dict[str, str]] = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(of_ranks, digests)
        digests = {name: digest for one in of_ranks for name, digest in one.items()}
    return hashlib.sha256(repr(sorted(digests.items())).encode()).hexdigest()


def _ensure_state(optimizer: Any) -> None:
    """Gives every parameter the state its optimizer starts with.

    `_init_group` is what `step` calls first in torch's optimizers: it makes the state that is
    missing and sorts it into lists, of which each kind of optimizer has its own number.
    """
    lists = len(inspect.signature(optimizer._init_group).parameters) - 1
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.requires_grad and not optimizer.state.get(parameter):
                gradient, parameter.grad = parameter.grad, torch.zeros_like(parameter)
                optimizer._init_group({**group, "params": [parameter]}, *([] for _ in range(lists)))
                parameter.grad = gradient
