"""What every sequence mixer owes: forward, sharding, state, cost."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rondo.models.config import ModelConfig
from rondo.models.layers import Linear

State = dict[str, Tensor]


@dataclass
class SequenceContext:
    """What a mixer may know about the tokens it sees."""

    positions: Tensor
    """`(B, T)` int64: index of each token within its document."""
    segment_ids: Tensor | None = None
    """`(B, T)` integer: other id, other document. None: each row is one document."""
    shared: dict[str, Any] = field(default_factory=dict)
    """Values of the modules that layers share (`Mixer.shared_modules`)."""
    keep_state: bool = True
    """Whether blocks hand on their mixer's state; without, it can be freed at once."""


@dataclass(frozen=True)
class Cost:
    """What a module costs; a multiply-add counts as two FLOPs."""

    flops: float
    """Forward FLOPs a token (matrix products only)."""
    parameters: int
    """Number of parameters."""
    state_bytes: int
    """Bytes carried from token to token, for one sequence."""

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.flops + other.flops,
            self.parameters + other.parameters,
            self.state_bytes + other.state_bytes,
        )


def module_cost(module: nn.Module, *, flops: float = 0.0, state_bytes: int = 0) -> Cost:
    """Cost of a module: its linear layers, plus what is given."""
    matmul = sum(2 * m.weight.numel() for m in module.modules() if isinstance(m, Linear))
    parameters = sum(p.numel() for p in module.parameters())
    return Cost(matmul + flops, parameters, state_bytes)


class Mixer(nn.Module):
    """Base of the sequence mixers.

    A subclass sets `Options` (a dataclass of its hyper-parameters) and `sharding`, and writes
    `forward`, `state_shapes` and `operator_flops`. It reaches other positions of the sequence
    only through its operators (`self.scan`, `self.conv`, `self.attend`), plain functions that
    can be replaced from outside.
    """

    Options: ClassVar[type]
    sharding: dict[str, str]
    """Submodule or parameter, by its dotted name -> "column" (split by output), "row" (split by
    input), "head" (split along its first dimension with the heads) or "replicate". What is split,
    is split by heads: a part of the mixer holds consecutive heads, and its output adds up over the
    parts. One without a "row" parameter says so by `output: "row"`."""
    first_head: int = 0
    """The first head this part of the mixer holds."""
    float32_parameters: ClassVar[tuple[str, ...]] = ()
    """Parameters never cast to a lower precision."""
    exact: ClassVar[bool] = True
    """Whether what stands elsewhere in a batch leaves every bit of an output as it is; if not,
    within rounding, or the tolerance of an iteration that stops sooner or later."""
    counters: ClassVar[dict[str, str]] = {}
    """Metric -> buffer that counts events in training, of this part of the mixer."""
    state_heads: ClassVar[int] = 1
    """The dimension of the recurrent state that counts heads."""
    gauges: ClassVar[dict[str, str]] = {}
    """Metric -> buffer with the largest value, 0 or more, that something had in training."""
    layer_counts: ClassVar[dict[str, str]] = {}
    """Metric -> gauge; counts the layers in which that is not 0, whatever the layout."""

    def __init__(self, config: ModelConfig, options: Any, layer: int) -> None:
        super().__init__()
        self.config = config
        self.options = options
        self.layer = layer

    @classmethod
    def problems(cls, config: ModelConfig, options: Any) -> list[str]:
        """What makes `options` impossible for `config`; each "option: reason"."""
        return []

    @classmethod
    def heads(cls, config: ModelConfig, options: Any) -> dict[str, int]:
        """What can be divided among ranks, by name of the option that sets it. The first entry
        counts the heads that `first_head` does."""
        raise NotImplementedError

    @classmethod
    def shared_modules(cls, config: ModelConfig, options: Any) -> dict[str, nn.Module]:
        """Modules without inputs whose value all layers of this kind read from `ctx.shared`."""
        return {}

    def bounds(self) -> dict[str, float]:
        """Parameters, by dotted name, and the absolute value beyond which training does not let
        them go."""
        return {}

    def forward(
        self, x: Tensor, ctx: SequenceContext, state: State | None = None
    ) -> tuple[Tensor, State]:
        """Mixes `x` `(B, T, dim)` along time; returns the output and the state after it."""
        raise NotImplementedError

    def state_shapes(
        self, batch: int, length: int
    ) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and type of each tensor of the state after `length` tokens; the type is that
        of a bfloat16 run."""
        raise NotImplementedError

    def operator_flops(self, length: int) -> float:
        """Forward FLOPs a token of the sequence operators, in sequences of `length` tokens, as
        the recurrence defines them (the extra work of a chunked form is not counted)."""
        raise NotImplementedError

    def cost(self, length: int) -> Cost:
        """Cost in sequences of `length` tokens."""
        shapes = self.state_shapes(1, length).values()
        state_bytes = sum(math.prod(shape) * dtype.itemsize for shape, dtype in shapes)
        return module_cost(self, flops=self.operator_flops(length), state_bytes=state_bytes)


@dataclass
class NoOptions:
    """No hyper-parameters."""


class ChannelMixer(nn.Module):
    """Base of the channel mixers: `forward(x)` works on each token `(B, T, dim)` by itself.

    One that passes something on to the channel mixers above it names it in `carried`, and its
    forward pass is then `forward(x, carry) -> (y, carry)`; one that names `shared_modules` too
    gets their values, by name: `forward(x, carry, shared) -> (y, carry)`.
    """

    Options: ClassVar[type] = NoOptions
    """A dataclass of its hyper-parameters, for what stands under its name in `config.ffns`."""
    sharding: dict[str, str]
    """As `Mixer.sharding`."""

    @classmethod
    def carried(cls, config: ModelConfig) -> dict[str, int]:
        """Name and width of what crosses layers beside the activations: tensors `(B, T, width)`,
        float32, zero before the first layer; layers that do not know them hand them on."""
        return {}

    @classmethod
    def losses(cls, config: ModelConfig) -> dict[str, float]:
        """Name and coefficient of auxiliary losses. Each is carried: a tensor `(B, T, 1)` to which
        a layer adds what each token contributes, so that losses are sums over tokens."""
        return {}

    @classmethod
    def shared_modules(cls, config: ModelConfig) -> dict[str, nn.Module]:
        """As `Mixer.shared_modules`."""
        return {}

    @classmethod
    def problems(cls, config: ModelConfig) -> list[str]:
        """What makes `config` impossible for it; each starts with its key."""
        return []

    def idle_parameters(self) -> int:
        """Parameters that take no part in one token's forward pass."""
        return 0

    @classmethod
    def expert_counts(cls, config: ModelConfig) -> dict[str, int]:
        """What expert-parallel ranks can divide, by name of the key that sets it."""
        return {}

    @classmethod
    def splits(cls, config: ModelConfig) -> dict[str, int]:
        """What can be divided among ranks, by name of the key that sets it."""
        return {}

    def cost(self, length: int) -> Cost:
        """Cost in sequences of `length` tokens."""
        return module_cost(self)


def split_heads(x: Tensor, width: int) -> Tensor:
    """`(B, T, heads·width)` -> `(B, T, heads, width)`, for all heads or a part of them."""
    return x.unflatten(-1, (-1, width))


def part_of(state: State | None, name: str) -> State | None:
    """The state of a mixer's part, from what `join_states` has put together."""
    if state is None:
        return None
    start = f"{name}."
    return {key[len(start) :]: x for key, x in state.items() if key.startswith(start)}


def join_states(**parts: Mapping[str, Any]) -> dict[str, Any]:
    """States of a mixer's parts (or their shapes), each name behind that of the part."""
    return {f"{part}.{key}": x for part, state in parts.items() for key, x in state.items()}


def get(state: State | None, name: str) -> Tensor | None:
    """`state[name]`, or None where there is no state."""
    return None if state is None else state.get(name)
