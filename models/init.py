"""Initial values of parameters: each a function of (shape, generator), attached to its parameter.

A parameter's values depend on the seed and on its name alone, so any layout over ranks, and any
change elsewhere in the model, leaves them as they are.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

Initializer = Callable[[tuple[int, ...], torch.Generator], Tensor]


def parameter(shape: tuple[int, ...], initializer: Initializer) -> nn.Parameter:
    """An uninitialised float32 parameter that knows how it starts."""
    result = nn.Parameter(torch.empty(shape))
    result.initializer = initializer  # type: ignore[attr-defined]
    return result


def normal(std: float) -> Initializer:
    """Gaussian of mean 0."""
    return lambda shape, generator: torch.empty(shape).normal_(0.0, std, generator=generator)


def constant(value: float) -> Initializer:
    """One value everywhere."""
    return lambda shape, generator: torch.full(shape, value)


def uniform(low: float, high: float) -> Initializer:
    """Uniform on [low, high)."""
    return lambda shape, generator: torch.empty(shape).uniform_(low, high, generator=generator)


def log_uniform(low: float, high: float) -> Initializer:
    """log(u) for u uniform on [low, high): `A_log` of Mamba-2 and Gated DeltaNet."""
    return lambda shape, generator: uniform(low, high)(shape, generator).log()


def inverse_softplus_step(high: float = 0.1) -> Initializer:
    """softplus⁻¹(dt) for dt log-uniform on [high / 100, high): `dt_bias` of Mamba
    (arXiv 2312.00752), where high is 0.1."""

    def draw(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        step = uniform(math.log(high / 100), math.log(high))(shape, generator).exp()
        return step + torch.log(-torch.expm1(-step))

    return draw


def initial_values(model: nn.Module, seed: int) -> Iterator[tuple[str, Tensor]]:
    """The initial value of every parameter of `model` (which may be on the meta device)."""
    for name, param in model.named_parameters():
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        initializer: Initializer = param.initializer  # type: ignore[attr-defined]
        with torch.device("cpu"):
            yield name, initializer(tuple(param.shape), generator)
