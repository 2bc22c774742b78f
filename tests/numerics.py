"""Comparisons that every numeric test uses."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def error_ratio(actual: Tensor, expected: Tensor) -> float:
    """RMS of the difference over RMS of `expected` (at least 1e-3, so that rounding where zero
    is expected passes); NaN in `actual` gives NaN."""
    actual, expected = actual.detach().double(), expected.detach().double()
    scale = expected.square().mean().sqrt().clamp_min(1e-3)
    return float((actual - expected).square().mean().sqrt() / scale)


def assert_ratio(name: str, actual: Tensor, expected: Tensor, limit: float) -> None:
    """Fails with the figures when `error_ratio` is above `limit` or not a number."""
    if actual.shape != expected.shape:
        raise AssertionError(f"{name}: shape {tuple(actual.shape)} != {tuple(expected.shape)}")
    ratio = error_ratio(actual, expected)
    if not ratio <= limit:
        raise AssertionError(f"{name}: error ratio {ratio:.3e} above {limit:.1e}")


def gradients(
    function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor], seed: int = 0
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs of `function(*inputs)` and the gradients of every input for fixed random output
    gradients (the same for the same seed and shapes, whatever the dtype)."""
    leaves = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
    outputs = list(function(*leaves))
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(y.shape, generator=generator, dtype=torch.float64) for y in outputs]
    weights = [x.to(y.device, y.dtype) for x, y in zip(weights, outputs, strict=True)]
    wanted = [x for x in leaves if x.requires_grad]
    grads = torch.autograd.grad(outputs, wanted, weights, allow_unused=True)
    return outputs, [
        torch.zeros_like(x) if g is None else g for x, g in zip(wanted, grads, strict=True)
    ]
