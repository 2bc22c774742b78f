"""The weights of the inner network, and what a sequence carries from one call to the next."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class FastWeights(NamedTuple):
    """Three matrices a head: initial values `(H, ...)`, or weights, gradients and momenta of every
    sequence `(B, H, ...)`. F is the width of the hidden layer."""

    gate: Tensor  # (.., F, K)
    up: Tensor  # (.., F, K)
    down: Tensor  # (.., V, F)

    def map(self, function: Callable[..., Tensor], *others: FastWeights) -> FastWeights:
        """`function` of each matrix, and of its namesakes in `others`."""
        return FastWeights(*map(function, self, *others))

    def pack(self) -> Tensor:
        """One tensor `(.., F, 2K + V)`: gate, up and the transpose of down side by side."""
        return torch.cat([self.gate, self.up, self.down.mT], dim=-1)

    @classmethod
    def unpack(cls, packed: Tensor, key_dim: int) -> FastWeights:
        """Views of what `pack` put together."""
        gate, up, down = packed.tensor_split((key_dim, 2 * key_dim), dim=-1)
        return cls(gate, up, down.mT)


class FastWeightState(NamedTuple):
    """What the tokens so far leave behind. Sums over the open chunk stand for its tokens, so that
    none has to be kept. All float32 (float64 for float64 inputs) but `count`."""

    weights: Tensor  # (B, H, F, 2K + V): at the start of the open chunk, see FastWeights.pack
    gradient: Tensor  # (B, H, F, 2K + V): summed over the tokens of the open chunk
    count: Tensor  # (B,) int64: tokens in the open chunk, below chunk_size
    momentum_buffer: Tensor | None = None  # (B, H, F, 2K + V); None without momentum
    momentum_sum: Tensor | None = None  # (B, H): momentum summed over the open chunk

    def to(self, dtype: torch.dtype) -> FastWeightState:
        """Everything but the count in `dtype`."""
        buffer, total = self.momentum_buffer, self.momentum_sum
        return FastWeightState(
            self.weights.to(dtype),
            self.gradient.to(dtype),
            self.count,
            None if buffer is None else buffer.to(dtype),
            None if total is None else total.to(dtype),
        )

    def row(self, index: int) -> FastWeightState:
        """The state of one sequence, with a batch of 1."""
        return FastWeightState._make(None if x is None else x[index : index + 1] for x in self)

    @classmethod
    def join(cls, rows: Sequence[FastWeightState]) -> FastWeightState:
        """The state of several batches put together."""
        fields = zip(*rows, strict=True)
        return cls._make(None if parts[0] is None else torch.cat(parts) for parts in fields)

    def matrices(self, key_dim: int) -> tuple[FastWeights, FastWeights, FastWeights | None]:
        """Weights, gradient and momentum buffer, unpacked."""
        buffer = self.momentum_buffer
        return (
            FastWeights.unpack(self.weights, key_dim),
            FastWeights.unpack(self.gradient, key_dim),
            None if buffer is None else FastWeights.unpack(buffer, key_dim),
        )


def first_state(initial: FastWeights, batch: int, momentum: bool) -> FastWeightState:
    """The state before the first token of a document."""
    weights = initial.pack().expand(batch, -1, -1, -1)
    zero = torch.zeros_like(weights)
    count = torch.zeros(batch, dtype=torch.int64, device=weights.device)
    if not momentum:
        return FastWeightState(weights, zero, count)
    return FastWeightState(weights, zero, count, zero, zero[:, :, 0, 0])


def fast_weight_state_shapes(
    batch: int,
    heads: int,
    key_dim: int,
    value_dim: int,
    hidden_dim: int,
    *,
    momentum: bool,
    dtype: torch.dtype = torch.float32,
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each tensor of a `FastWeightState`. A sequence takes
    `2 H F (2K + V)` numbers and a count; with momentum `3 H F (2K + V) + H`."""
    matrices = (batch, heads, hidden_dim, 2 * key_dim + value_dim)
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "weights": (matrices, dtype),
        "gradient": (matrices, dtype),
        "count": ((batch,), torch.int64),
    }
    if momentum:
        shapes["momentum_buffer"] = (matrices, dtype)
        shapes["momentum_sum"] = ((batch, heads), dtype)
    return shapes
