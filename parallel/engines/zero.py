"""Tensors that ZeRO shares out, as a checkpoint wants them, and back.

ZeRO cuts what it shares out by place in one long vector. A checkpoint wants slices of each tensor:
one tensor at a time is gathered, and each rank keeps its rows of it in host memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import deepspeed
import torch
from deepspeed import utils
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.optim import Optimizer

from rondo.models import Decoder
from rondo.parallel.checkpoint import model_tensors
from rondo.parallel.data_parallel import local_part
from rondo.parallel.engines.moments import MOMENTS, common_step, whole
from rondo.parallel.mesh import SHARDED, Ranks

_VECTORS = "single_partition_of_fp32_groups"


@torch.no_grad()
def materialise_shared(
    part: Decoder,
    values: Iterable[tuple[str, Tensor]],
    device: torch.device,
    config: Mapping[str, Any],
) -> None:
    """Brings `part` from the meta device to `device` and shares its parameters out (ZeRO 3), one
    after the other: no rank holds more than its share and one tensor."""
    swapper = None  # one for all: each has buffers of its own
    for module in part.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.zeros_like(buffer, device=device))
    for name, value in values:
        owner, _, leaf = name.rpartition(".")
        module, old = part.get_submodule(owner), part.get_parameter(name)
        holder = nn.ParameterList()
        param = nn.Parameter(value.to(device, old.dtype), requires_grad=old.requires_grad)
        setattr(module, leaf, param)
        holder.append(param)
        swapper = deepspeed.zero.Init(
            module=holder, config_dict_or_path=dict(config), param_swapper=swapper
        ).param_swapper


class ZeroTensors:
    """The tensors of a model and of its AdamW under ZeRO 1, 2 or 3. All methods are collective.

    Args:
        part: the model.
        zero: DeepSpeed's optimizer.
        adamw: the one inside it.
        ranks: all ranks.
    """

    def __init__(self, part: Decoder, zero: Any, adamw: Optimizer, ranks: Ranks) -> None:
        self.part, self.zero, self.adamw = part, zero, adamw
        self.params = dict(part.named_parameters())
        self._divided = hasattr(next(iter(self.params.values())), "ds_id")
        """Whether parameters are, too."""
        self._mesh = DeviceMesh.from_group(ranks.group(SHARDED), "cpu")
        vectors = "fp32_partitioned_groups_flat" if self._divided else _VECTORS
        self._vectors: list[Tensor] = getattr(zero, vectors)
        """What this rank updates: AdamW's state is by these."""
        self._make_state()

    def model(self) -> dict[str, Tensor]:
        """Parameters and persistent buffers by name; themselves where they are not divided."""
        tensors = model_tensors([self.part])
        if self._divided:
            for name, param in self.params.items():
                with gathered(param):
                    tensors[name] = self._rows(param.detach())
        return tensors

    @torch.no_grad()
    def optimizer(self) -> dict[str, Tensor]:
        """Moments and step of every trained parameter, by name; copies."""
        step = self.adamw.state[self._vectors[0]]["step"].cpu()
        tensors: dict[str, Tensor] = {}
        for name, param in self._trained():
            tensors[f"{name}.step"] = step.clone()
            for key in MOMENTS:
                full = utils.safe_get_full_optimizer_state(param, key)
                tensors[f"{name}.{key}"] = self._rows(full.view(self._shape(param)))
        return tensors

    @torch.no_grad()
    def take_in(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Goes on from the filled `model` and `optimizer`, or one of them. Raises UserError where
        parameters have made different numbers of steps: ZeRO counts them for all."""
        for name, value in tensors.get("model", {}).items():
            if name in self.params:
                self.write(name, whole(value))
        states = tensors.get("optimizer")
        if states is None:
            return
        step = common_step(states, (name for name, _ in self._trained()), "deepspeed")
        for vector in self._vectors:
            self.adamw.state[vector]["step"].fill_(step)
        for name, param in self._trained():
            for key in MOMENTS:
                self._set(param, whole(states[f"{name}.{key}"]), key)

    @torch.no_grad()
    def write(self, name: str, value: Tensor) -> None:
        """Sets a parameter: what passes use, and what is updated."""
        param = self.params[name]
        if self._divided:
            with gathered(param, changed=True):
                param.copy_(value)
        else:
            param.copy_(value)
        if param.requires_grad:
            self._set(param, value)

    @torch.no_grad()
    def clamp(self, name: str, bound: float) -> None:
        """Keeps a parameter within `bound` of 0."""
        if self._divided:
            with gathered(self.params[name]):
                value = self.params[name].clamp(-bound, bound)
        else:
            value = self.params[name].clamp(-bound, bound)
        self.write(name, value)

    def zeros(self, param: Any) -> Tensor:
        """Of a parameter's whole shape."""
        return param.new_zeros(self._shape(param))

    def _trained(self) -> Iterator[tuple[str, Any]]:
        return ((name, param) for name, param in self.params.items() if param.requires_grad)

    def _shape(self, param: Any) -> torch.Size:
        return param.ds_shape if self._divided else param.shape

    def _set(self, param: Any, value: Tensor, key: str | None = None) -> None:
        """Sets what ZeRO updates of a parameter, or its state `key`, to this rank's share."""
        value = value.to(self._vectors[0].device)
        if not self._divided:
            keyed = () if key is None else (key,)
            setter = utils.safe_set_full_optimizer_state if key else utils.safe_set_full_fp32_param
            setter(param, value, *keyed)
            return
        # Shares are of one size: the last is filled up.
        size, rank = param.partition_numel(), self._mesh.get_local_rank()
        padded = value.new_zeros(size * self._mesh.size())
        padded[: value.numel()] = value.flatten()
        self.zero.set_local_hp_param(padded[rank * size :][:size], param, key)

    def _rows(self, full: Tensor) -> Tensor:
        """A whole tensor as a DTensor of which this rank holds some rows, in host memory."""
        if full.ndim == 0:
            return full.cpu().clone()
        local = local_part(full, self._mesh, (Shard(0),)).cpu().clone()
        return DTensor.from_local(
            local, self._mesh, [Shard(0)], shape=full.shape, stride=full.stride(), run_check=False
        )

    def _make_state(self) -> None:
        """Gives AdamW the state that it makes in its first step otherwise: DeepSpeed looks for it
        after the update of the first group of parameters, when others have none."""
        for number, vector in enumerate(self._vectors):
            on_disk = self._divided and self.zero._swappable_optimizer_subgroup(number)
            if on_disk:
                self.zero._optimizer_states_and_gradient_swap_in(number)
            step = torch.zeros((), dtype=torch.float32, device=vector.device)
            moments = {key: torch.zeros_like(vector) for key in MOMENTS}
            self.adamw.state[vector] = {"step": step, **moments}
            if on_disk:
                self.zero._optimizer_states_and_gradient_swap_out(number)
        if not self._divided:
            self.zero._lazy_init_hp_params_optimizer_state()


def gathered(param: Any, *, changed: bool = False) -> AbstractContextManager[Any]:
    """Inside, a divided parameter is whole; `changed`: rank 0's value is kept after."""
    return deepspeed.zero.GatheredParameters([param], modifier_rank=0 if changed else None)
