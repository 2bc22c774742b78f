"""Sizes of models whose layers are timed, and random inputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rondo.kernels import l2_norm


@dataclass(frozen=True)
class Preset:
    """Sizes of a model whose layers are timed."""

    dim: int
    vocabulary: int
    heads: int
    key_dim: int
    value_dim: int
    attention_heads: int
    attention_dim: int


PRESETS = {
    "1.3b": Preset(2048, 32000, 8, 256, 256, 32, 64),
    "7b": Preset(3840, 100352, 32, 96, 192, 32, 128),
}
"""Those of `models/presets/gated-deltanet-{1.3b,7b}.yaml`."""


def draw(*shape: int, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Normal numbers that ask for a gradient, as all here do."""
    return torch.randn(shape, device=device, dtype=dtype).requires_grad_()


def unit(*shape: int, device: torch.device) -> Tensor:
    """Vectors of length 1, bfloat16."""
    return l2_norm(draw(*shape, device=device).detach()).requires_grad_()


def matrices(heads: int, out: int, into: int, device: torch.device) -> Tensor:
    """Float32 weights `(heads, out, into)` that keep about the size of their inputs."""
    return (torch.randn(heads, out, into, device=device) / into**0.5).requires_grad_()
