"""What Megatron's distributed optimizer shares out, as a checkpoint wants it, and back.

A rank updates a stretch of some flattened parameters. To save, one tensor at a time is gathered
over data ranks, and each keeps its rows of it in host memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from rondo.models import Decoder
from rondo.models.mixer import Mixer
from rondo.parallel.checkpoint import model_tensors
from rondo.parallel.data_parallel import local_part
from rondo.parallel.engines.moments import MOMENTS, common_step, whole
from rondo.parallel.mesh import DATA, Ranks


class Split(NamedTuple):
    """How tensor-parallel ranks divide a parameter."""

    mesh: DeviceMesh
    placement: Placement
    shape: torch.Size
    stride: tuple[int, ...]


class Piece(NamedTuple):
    """What this rank updates of a flattened parameter."""

    main: Tensor
    start: int
    end: int


class MegatronTensors:
    """The tensors of a model and of its AdamW under Megatron's distributed optimizer. All methods
    that take or give tensors are collective.

    Args:
        part: the model; its parameters are plain tensors.
        optimizer: Megatron's, around AdamW.
        ranks: all ranks.
        splits: of the parameters that tensor-parallel ranks divide, by name.
        exact: float32 values of the parameters that passes use in lower precision, by name.
    """

    def __init__(
        self,
        part: Decoder,
        optimizer: Any,
        ranks: Ranks,
        splits: Mapping[str, Split],
        exact: Mapping[str, Tensor],
    ) -> None:
        self.part, self.ranks, self.splits = part, ranks, splits
        self.params = dict(part.named_parameters())
        self.low = frozenset(exact)
        self._state = optimizer.optimizer.state
        self._pieces = _pieces(optimizer)
        self._make_state()
        layout = ranks.layout
        # Tensor-parallel ranks divide first, then data ranks what each of these holds.
        numbers = torch.arange(ranks.size).view(layout.data_size, layout.tp).T.contiguous()
        self._mesh = DeviceMesh("cpu", numbers, mesh_dim_names=("tp", "data"))
        for name, value in exact.items():
            self._set(name, value)

    def model(self) -> dict[str, Tensor]:
        """Parameters and persistent buffers by name: themselves, or copies of what is updated
        where passes use lower precision."""
        tensors = model_tensors([self.part])
        for name, param in self.params.items():
            if name in self.low:
                tensors[name] = self._rows(name, self._gathered(param))
            elif name in self.splits:
                tensors[name] = self._divided(name, param.detach())
        return tensors

    @torch.no_grad()
    def optimizer(self) -> dict[str, Tensor]:
        """Moments and step of every trained parameter, by name; copies."""
        tensors: dict[str, Tensor] = {}
        step = self._step()
        for name, param in self._trained():
            tensors[f"{name}.step"] = step.clone()
            for key in MOMENTS:
                tensors[f"{name}.{key}"] = self._rows(name, self._gathered(param, key))
        return tensors

    @torch.no_grad()
    def take_in(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Goes on from the filled `model` and `optimizer`, or one of them. Raises UserError where
        parameters have made different numbers of steps."""
        for name, value in tensors.get("model", {}).items():
            if name in self.low:
                self._set(name, self._own(name, whole(value)))
        states = tensors.get("optimizer")
        if states is None:
            return
        step = common_step(states, (name for name, _ in self._trained()), "megatron")
        for state in self._state.values():
            state["step"].fill_(step)
        for name, param in self._trained():
            for key in MOMENTS:
                value = self._own(name, whole(states[f"{name}.{key}"]))
                if (piece := self._pieces.get(param)) is not None:
                    moment = self._state[piece.main][key]
                    moment.copy_(value.flatten()[piece.start : piece.end])

    @torch.no_grad()
    def keep_bounds(self) -> None:
        """Cuts what is updated back to what mixers say (`Mixer.bounds`)."""
        for mixer in self.part.modules():
            if isinstance(mixer, Mixer):
                for name, bound in mixer.bounds().items():
                    piece = self._pieces.get(mixer.get_parameter(name))
                    if piece is not None:
                        piece.main.clamp_(-bound, bound)

    def _trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, param) for name, param in self.params.items() if param.requires_grad)

    def _make_state(self) -> None:
        """Gives AdamW the state that it makes in its first step otherwise."""
        for piece in self._pieces.values():
            moments = {key: torch.zeros_like(piece.main.detach()) for key in MOMENTS}
            step = torch.zeros((), dtype=torch.float32, device=piece.main.device)
            self._state[piece.main] = {"step": step, **moments}

    def _step(self) -> Tensor:
        """Steps so far; a rank may have no piece of any parameter."""
        own = [state["step"] for state in self._state.values()][:1]
        steps = torch.stack([torch.zeros((), device=self.ranks.device), *own])
        return self.ranks.largest(steps.amax(0, keepdim=True))[0].cpu()

    @torch.no_grad()
    def _gathered(self, param: nn.Parameter, key: str | None = None) -> Tensor:
        """All of what data ranks update of a parameter, or of its state `key`, in float32."""
        flat = torch.zeros(param.numel(), dtype=torch.float32, device=param.device)
        if (piece := self._pieces.get(param)) is not None:
            value = piece.main if key is None else self._state[piece.main][key]
            flat[piece.start : piece.end] = value
        dist.all_reduce(flat, group=self.ranks.group(DATA))
        return flat.view(param.shape)

    @torch.no_grad()
    def _set(self, name: str, value: Tensor) -> None:
        """Sets what passes use of a parameter, and what is updated."""
        param = self.params[name]
        param.copy_(value)
        if (piece := self._pieces.get(param)) is not None:
            piece.main.copy_(value.flatten()[piece.start : piece.end])

    def _own(self, name: str, value: Tensor) -> Tensor:
        """What this tensor-parallel rank holds of a whole tensor."""
        split = self.splits.get(name)
        return value if split is None else local_part(value, split.mesh, (split.placement,))

    def _divided(self, name: str, local: Tensor) -> Tensor:
        mesh, placement, shape, stride = self.splits[name]
        return DTensor.from_local(
            local, mesh, [placement], shape=shape, stride=stride, run_check=False
        )

    def _rows(self, name: str, local: Tensor) -> Tensor:
        """What tensor-parallel ranks hold of a tensor, as a DTensor of which data ranks hold some
        rows each, in host memory."""
        if local.ndim == 0:
            return local.cpu().clone()
        split = self.splits.get(name)
        shape, stride = (local.shape, local.stride()) if split is None else split[2:]
        first = Replicate() if split is None else split.placement
        rows = local_part(local, self._mesh["data"], (Shard(0),)).cpu().clone()
        return DTensor.from_local(
            rows, self._mesh, [first, Shard(0)], shape=shape, stride=stride, run_check=False
        )


def _pieces(optimizer: Any) -> dict[Tensor, Piece]:
    """What this rank updates, by the model's parameter."""
    found: dict[Tensor, Piece] = {}
    kinds = (
        (optimizer.model_float16_groups, optimizer.shard_fp32_from_float16_groups),
        (optimizer.model_fp32_groups, optimizer.shard_fp32_groups),
    )
    for model_groups, main_groups in kinds:
        for params, mains in zip(model_groups, main_groups, strict=True):
            for param, main in zip(params, mains, strict=True):
                stretch = optimizer._get_model_param_range_map(param)["param"]
                found[param] = Piece(main, stretch.start, stretch.end)
    return found
