"""The tensors of a training run by name, and a digest of them."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rondo.parallel.checkpoint.collective import CheckpointError
from rondo.parallel.checkpoint.staging import Tensors

_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name; the tensors themselves, not copies.

    A tensor with several names comes once, under the first. Names do not depend on torch.compile
    or activation checkpointing. Under FSDP2 this brings parameters back to their sharded form.
    """
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        for wrapper in _WRAPPERS:
            name = name.replace(wrapper, "")
        tensors[name] = tensor
    return tensors


def optimizer_tensors(
    model: nn.Module, optimizers: Iterable[torch.optim.Optimizer]
) -> dict[str, Tensor]:
    """State of all optimizers as `<parameter>.<key>` ("head.weight.exp_avg", "...step").

    These are the tensors themselves: filling them restores the optimizers. State that does not
    exist yet is made (zero, as before the first step), so that there is something to fill.
    Learning rates and the like are not state; they follow from recipe and step.
    """
    names = {id(tensor): name for name, tensor in model_tensors(model).items()}
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
                for key, value in optimizer.state[parameter].items():
                    name = f"{names[id(parameter)]}.{key}"
                    if not isinstance(value, Tensor):
                        raise CheckpointError(f"{name} is a {type(value)}, expected a Tensor")
                    tensors[name] = value
    return tensors


@torch.no_grad()
def state_digest(tensors: Tensors) -> str:
    """SHA-256 over the names, types, shapes and bytes of whole tensors, as hex.

    The same for equal values under any layout. Gathers one DTensor at a time; every rank that
    has a part must call it.
    """
    digest = hashlib.sha256()
    for part in sorted(tensors):
        for name, tensor in sorted(tensors[part].items()):
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            header = f"{part}/{name} {whole.dtype} {tuple(whole.shape)}\n"
            digest.update(header.encode())
            flat = whole.detach().cpu().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


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
