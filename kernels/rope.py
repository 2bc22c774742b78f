"""Rotary position embedding (Su et al. 2021), in the half-split layout of Llama checkpoints."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rondo.kernels.tiles import ROW_TILE, tiles


@dataclass(frozen=True)
class RopeScaling:
    """Slower rotations for texts longer than those of pretraining, as in the released code of Llama
    3.1 (`rope_type: llama3` in Hugging Face's configurations, which has these names).

    A pair that turns `n = original_max_position_embeddings * w / (2 pi)` times in the length of
    pretraining has the angle `w * (s + (1 - s) / factor)` a position instead of `w`, with
    `s = (n - low_freq_factor) / (high_freq_factor - low_freq_factor)`, at least 0 and at most 1:
    pairs that turn often stay as they are, and those that turn seldom are slowed down.
    """

    factor: float = 8.0
    """How much slower the slowest pairs turn."""
    low_freq_factor: float = 1.0
    """Pairs that turn fewer times than this are slowed down by all of `factor`."""
    high_freq_factor: float = 4.0
    """Pairs that turn more often than this stay as they are."""
    original_max_position_embeddings: int = 8192
    """Tokens in the sequences of pretraining."""

    def problem(self) -> str | None:
        """Why there are no such frequencies; None if there are."""
        if self.low_freq_factor < self.high_freq_factor:
            return None
        return (
            f"low_freq_factor: {self.low_freq_factor:g} must be below high_freq_factor "
            f"{self.high_freq_factor:g}"
        )

    def scale(self, frequencies: Tensor) -> Tensor:
        """The angles a position instead of `frequencies`, radians."""
        turns = self.original_max_position_embeddings * frequencies / (2 * math.pi)
        width = self.high_freq_factor - self.low_freq_factor
        kept = ((turns - self.low_freq_factor) / width).clamp(0.0, 1.0)
        return frequencies * (kept + (1 - kept) / self.factor)


def rope(
    x: Tensor, positions: Tensor, *, theta: float = 10000.0, dims: int | None = None
) -> Tensor:
    """Rotates the pairs `(x_i, x_{i + dims/2})` by the angle `position * theta ** (-2 i / dims)`.

    Args:
        x: `(B, T, H, D)`.
        positions: `(B, T)` integer.
        theta: base of the frequencies.
        dims: how many leading channels rotate, even; None for all D. The rest pass unchanged.

    Returns:
        `(B, T, H, D)` in the dtype of `x`. Angles, sines and products are float32 (float64 for
        float64 `x`).

    Raises:
        ValueError: shapes, theta or dims do not fit.
    """
    dims = x.shape[-1] if dims is None else dims
    if x.ndim != 4 or positions.shape != x.shape[:2]:
        raise ValueError(
            f"rope: x {tuple(x.shape)} must be (B, T, H, D) and positions "
            f"{tuple(positions.shape)} (B, T)"
        )
    if dims < 2 or dims % 2 or dims > x.shape[-1]:
        raise ValueError(f"rope: dims must be even, from 2 to {x.shape[-1]}, got {dims}")
    if not theta > 0:
        raise ValueError(f"rope: theta must be positive, got {theta}")
    dtype = torch.promote_types(x.dtype, torch.float32)
    return rotate(x, *rope_table(positions, dims, theta=theta, dtype=dtype))


def rope_table(
    positions: Tensor,
    dims: int,
    *,
    theta: float = 10000.0,
    scaling: RopeScaling | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines, each `(B, T, 1, dims)`, for `rotate`; `(1, T, 1, dims)` for
    positions that are one row expanded. Frequencies are those of `rope`, or what `scaling` makes
    of them.

    Layers that rotate by the same positions can share one table.
    """
    if positions.stride(0) == 0:
        positions = positions[:1]
    index = torch.arange(0, dims, 2, device=positions.device, dtype=dtype)
    frequencies = theta ** (-index / dims)
    if scaling is not None:
        frequencies = scaling.scale(frequencies)
    angles = positions[..., None, None].to(dtype) * frequencies
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Applies a table of `rope_table` to `x` `(B, T, H, D)`; no gradient reaches the table."""
    return _Rotate.apply(x, cos, sin)


def _turn(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> Tensor:
    batch, time, heads, width = x.shape
    dims = cos.shape[-1]
    half = dims // 2
    size = ROW_TILE if x.device.type == "cpu" else x.numel()
    for rows, times in tiles((batch, time, heads * width), size, 1):
        own = slice(None) if len(cos) == 1 else rows
        c, s = (table[own, times].transpose(1, 2) for table in (cos, sin))
        part = x[rows, times, :, :dims].transpose(1, 2)
        wide = torch.empty(part.shape, dtype=cos.dtype, device=x.device).copy_(part)
        turned = wide * c
        turned[..., :half].addcmul_(wide[..., half:], s[..., :half])
        turned[..., half:].addcmul_(wide[..., :half], s[..., half:])
        out[rows, times, :, :dims] = turned.transpose(1, 2)
    if dims < width:
        out[..., dims:] = x[..., dims:]
    return out


def _heads_first(x: Tensor) -> Tensor:
    """Room for `x`, on a CPU as attention's products there take it: heads before time in memory."""
    if x.device.type != "cpu":
        return x.new_empty(x.shape)
    batch, time, heads, width = x.shape
    return x.new_empty(batch, heads, time, width).transpose(1, 2)


class _Rotate(torch.autograd.Function):
    """The transpose of a rotation is the rotation by the opposite angle; x is not saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin, _heads_first(x))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(grad, cos, -sin, grad.new_empty(grad.shape)), None, None
