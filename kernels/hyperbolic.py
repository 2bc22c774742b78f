"""tanh in place, fast on a CPU."""

from __future__ import annotations

from torch import Tensor

_ONE_FROM = 40.0  # of 2x
"""tanh(20) is 1 to float64's rounding; exp(40) is finite in float32."""


def tanh_(x: Tensor) -> Tensor:
    """`x.tanh_()`. On a CPU torch takes 6 ns a number for it, 0.7 for expm1 (2.13, one thread):
    tanh x = e / (e + 2) with e = exp(2x) - 1, to a few roundings for any x. Elsewhere torch's."""
    if x.device.type != "cpu":
        return x.tanh_()
    x.mul_(2.0).clamp_(max=_ONE_FROM).expm1_()
    return x.div_(x + 2.0)


def tanh(x: Tensor, out: Tensor | None = None) -> Tensor:
    """`torch.tanh`, likewise; `out` must not overlap `x`."""
    return tanh_(x.clone() if out is None else out.copy_(x))
