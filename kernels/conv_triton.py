"""The short convolution by Triton kernels; see `conv_triton_kernels.py`."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from rondo.kernels.conv_triton_kernels import conv_backward, conv_forward
from rondo.kernels.triton_configs import Config
from rondo.kernels.triton_support import Compilation, launch, opaque, resident_programs

SHARES = 64
"""Sums of the weight's gradient, each over some of the tiles, at most."""


def triton_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor,
    ids: Tensor | None,
    silu: bool,
) -> Tensor:
    """See `short_conv`; ids are those of the state and of x, `(B, W-1+T)`."""
    return _ShortConv.apply(x, weight, bias, initial_state, ids, silu)


class _ShortConv(torch.autograd.Function):
    """Saves the inputs alone."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        initial_state: Tensor,
        ids: Tensor | None,
        silu: bool,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, bias, initial_state, ids)
        ctx.silu = silu
        return _forward(x, weight, bias, initial_state, ids, silu)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, initial_state, ids = ctx.saved_tensors
        grad_x, grad_state, weights, biases = _backward(
            grad, x, weight, bias, initial_state, ids, ctx.silu
        )
        grad_weight = weights.sum(dim=0).T.to(weight.dtype)
        grad_bias = None if bias is None else biases.sum(dim=0).to(bias.dtype)
        return grad_x, grad_weight, grad_bias, grad_state, None, None


def _fake_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor,
    ids: Tensor | None,
    silu: bool,
) -> Tensor:
    return x.new_empty(x.shape)


@opaque("triton_short_conv", _fake_forward)
def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor,
    ids: Tensor | None,
    silu: bool,
) -> Tensor:
    y = _fake_forward(x, weight, bias, initial_state, ids, silu)
    x, weight, bias, state, ids = _contiguous(x, weight, bias, initial_state, ids)
    batch, time, channels = x.shape

    def start(config: Config) -> None:
        tiles = triton.cdiv(time, config["TIME"])
        blocks = triton.cdiv(channels, config["BLOCK"])
        conv_forward[(batch * tiles * blocks,)](
            x, weight, bias, state, ids, y, time, tiles, blocks, channels,
            HISTORY=weight.shape[1] - 1, SILU=silu, **config,
        )  # fmt: skip

    if x.numel():
        launch("short_conv_forward", "*", x, tuple(weight.shape), start)
    return y


def _shares(x: Tensor) -> int:
    """How many programs sum the gradient of one block of channels."""
    return min(SHARES, resident_programs(x.device))


def _fake_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor,
    ids: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    channels, width = weight.shape
    return (
        x.new_empty(x.shape),
        initial_state.new_empty(initial_state.shape),
        x.new_empty(_shares(x), width, channels, dtype=torch.float32),
        x.new_empty(_shares(x), channels, dtype=torch.float32),
    )


@opaque("triton_short_conv_backward", _fake_backward)
def _backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor,
    ids: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x and of the state, and sums that add up to those of weight `(P, W, C)` and
    bias `(P, C)`."""
    results = _fake_backward(grad, x, weight, bias, initial_state, ids, silu)
    grad, x, weight, bias, state, ids = _contiguous(grad, x, weight, bias, initial_state, ids)
    (batch, time, channels), history = x.shape, weight.shape[1] - 1

    def start(config: Config) -> None:
        tiles = triton.cdiv(time + history, config["TIME"])
        blocks = triton.cdiv(channels, config["BLOCK"])
        conv_backward[(_shares(x) * blocks,)](
            grad, x, weight, bias, state, ids, *results, time, tiles, batch, blocks, channels,
            HISTORY=history, TAPS=triton.next_power_of_2(history + 1), SILU=silu, **config,
        )  # fmt: skip

    if not x.numel():
        for y in results:
            y.zero_()
        return results
    launch("short_conv_backward", "*", x, tuple(weight.shape), start)
    return results


def _contiguous(*tensors: Tensor | None) -> Any:
    return [None if x is None else x.contiguous() for x in tensors]


def ahead_of_time() -> list[Compilation]:
    """Four taps with an activation, with documents in bfloat16 and float32, and without."""
    listed = []
    types = dict.fromkeys(("weight", "bias", "grad_weights", "grad_biases"), "*fp32")
    types |= dict.fromkeys(("time", "tiles", "rows", "blocks", "channels"), "i32")
    for kind, extra in (("*bf16", {}), ("*bf16", {"ids": None}), ("*fp32", {})):
        types |= dict.fromkeys(("x", "y", "state", "grad", "grad_x", "grad_state"), kind)
        constants = {"HISTORY": 3, "SILU": True, **extra}
        for name, kernel, more in (
            ("short_conv_forward", conv_forward, {}),
            ("short_conv_backward", conv_backward, {"TAPS": 4}),
        ):
            listed.append(
                Compilation(
                    name, kernel, types | {"ids": "*i64"}, constants | more, multiples=("channels",)
                )
            )
    return listed
