"""The short convolution of one document a row, by the depthwise convolution of oneDNN.

`(B, T, C)` is what the library calls channels last, which it reads without a transpose. Its
gradient of the weights is slow for one input channel, so that one is made here.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def library_serves(x: Tensor, segment_ids: Tensor | None) -> bool:
    """Whether `library_conv` is there for these inputs, and the fastest."""
    return (
        x.dtype == torch.bfloat16
        and x.device.type == "cpu"
        and segment_ids is None
        and not torch.compiler.is_compiling()
        and torch.backends.mkldnn.is_available()
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def library_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor,
    ids: Tensor | None,
    silu: bool,
) -> Tensor:
    """See `short_conv`; `ids` must be None. The weight is rounded to the dtype of `x`."""
    if ids is not None:
        raise ValueError("short_conv: backend 'library' takes no segment_ids")
    return _LibraryConv.apply(x, weight, bias, initial_state, silu)


def _as_image(rows: Tensor) -> Tensor:
    """`(N, C)` as the library reads it without a copy: an image of one row, channels last."""
    return rows.T[None, :, None]


def _convolve(padded: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`y_t = bias + sum_j weight[:, j] * padded_{t + j}`: `(B, W-1+T, C)` to `(B, T, C)`."""
    channels = padded.shape[2]
    image = padded.unsqueeze(1).permute(0, 3, 1, 2)
    y = F.conv2d(image, weight[:, None, None], bias, groups=channels)
    return y.permute(0, 2, 3, 1).squeeze(1).contiguous()


class _LibraryConv(torch.autograd.Function):
    """Saves the inputs and, with an activation, what goes into it."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        initial_state: Tensor,
        silu: bool,
    ) -> Tensor:
        padded = torch.cat((initial_state, x), dim=1)
        taps = weight.to(x.dtype)
        y = _convolve(padded, taps, None if bias is None else bias.to(x.dtype))
        ctx.save_for_backward(padded, weight, bias, y if silu else None)
        return F.silu(y) if silu else y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        padded, weight, bias, before = ctx.saved_tensors
        history, time = weight.shape[1] - 1, grad.shape[1]
        # What reaches an input comes from its own time and later: zeros stand for what is after.
        later = grad.new_empty(grad.shape[0], time + history, grad.shape[2])
        later[:, time:] = 0
        own = later[:, :time]
        if before is None:
            own.copy_(grad)
        else:
            torch.ops.aten.silu_backward.grad_input(grad, before, grad_input=own)
        flipped = weight.to(grad.dtype).flip(1)
        grad_state = grad[:, :0]
        if history and ctx.needs_input_grad[3]:
            grad_state = _convolve(F.pad(later[:, :history], (0, 0, history, 0)), flipped)
        sums = _sums(later, padded, history + 1)
        return (
            _convolve(later, flipped) if ctx.needs_input_grad[0] else None,
            sums[:, :-1].to(weight.dtype),
            None if bias is None else sums[:, -1].to(bias.dtype),
            grad_state,
            None,
        )


def _sums(later: Tensor, padded: Tensor, width: int) -> Tensor:
    """`(C, W + 1)`, at least float32: sums over rows and times of `grad_t * padded_{t + j}` for
    each tap j, and of `grad_t`; `later` is the gradient with `W - 1` zeros after each row.

    The gradient of batch norm's weight is such a sum, in one pass over the dtype as it is, when
    means are 0 and deviations 1. Rows follow one another: what one takes in of the next meets
    zeros.
    """
    dtype = torch.promote_types(later.dtype, torch.float32)
    grads, inputs = later.flatten(0, 1), padded.flatten(0, 1)
    zeros, ones = (grads.new_full((grads.shape[1],), x, dtype=dtype) for x in (0, 1))
    sums: list[Tensor] = []
    for tap in range(width):
        pair = (_as_image(x) for x in (grads[: len(grads) - tap], inputs[tap:]))
        _, product, total = torch.ops.aten.native_batch_norm_backward(
            *pair, ones, None, None, zeros, ones, True, 0.0, [False, True, True]
        )
        sums.append(product)
    return torch.stack([*sums, total], dim=1)
