"""Short causal depthwise convolution, with documents and a carried state."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from rondo.kernels.backend import choose, triton_refusal
from rondo.kernels.conv_library import library_conv, library_serves
from rondo.kernels.tiles import Tile, tiles

TILE = 2**19
"""Elements of x that are worked on at a time, so that float32 intermediates stay in cache."""
MIN_TILE_TIME = 64
TRITON_TAPS = 16
"""The widest window whose taps the Triton kernel unrolls."""


def short_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    segment_ids: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`y_t = act(bias + sum_s weight[:, W - 1 - s] * x_{t - s})`, each channel on its own.

    Args:
        x: `(B, T, C)`.
        weight: `(C, W)`; `weight[:, -1]` multiplies the current token.
        bias: `(C,)`.
        activation: None or "silu".
        initial_state: `(B, W - 1, C)`, the inputs before position 0 (of its document); None for
            zeros.
        segment_ids: `(B, T)` integer, non-decreasing in a row: inputs of other documents count
            as zeros.
        backend: "auto", "reference", "chunked", "triton", or "library" (oneDNN; no
            `segment_ids`). "auto" takes triton on a GPU, library in bfloat16 on a CPU where it
            serves these inputs, else chunked.

    Returns:
        y `(B, T, C)` and the state `(B, W - 1, C)`: the last W - 1 inputs, zeros where they lie
        before the last document; both in the dtype of `x`.

    Raises:
        ValueError: shapes, activation or backend do not fit.
    """
    _check(x, weight, bias, activation, initial_state, segment_ids)
    history = weight.shape[1] - 1
    if initial_state is None:
        initial_state = x.new_zeros(x.shape[0], history, x.shape[2])
    initial_state = initial_state.to(x.dtype)
    ids = None
    if segment_ids is not None:
        ids = torch.cat((segment_ids[:, :1].expand(-1, history), segment_ids), dim=1)
    if backend == "auto" and library_serves(x, segment_ids):
        backend = "library"
    refusal = _triton_refusal(x, weight, bias, initial_state)
    run = choose("short_conv", backend, IMPLEMENTATIONS, x.device, refusal)
    y = run(x, weight, bias, initial_state, ids, activation == "silu")
    return y, _last_inputs(x, initial_state, ids)


def _triton_refusal(x: Tensor, weight: Tensor, *others: Tensor | None) -> str | None:
    """Why the Triton kernel cannot run, or None."""
    if weight.shape[1] > TRITON_TAPS:
        return f"it takes at most {TRITON_TAPS} taps, got {weight.shape[1]}"
    return triton_refusal(x, weight, *others)


def _triton(*arguments: Any) -> Tensor:
    from rondo.kernels.conv_triton import triton_conv

    return triton_conv(*arguments)


def _last_inputs(x: Tensor, initial_state: Tensor, ids: Tensor | None) -> Tensor:
    """The state after the last position; ids are those of the state and of x, `(B, W-1+T)`."""
    history, time = initial_state.shape[1], x.shape[1]
    recent = x[:, max(time - history, 0) :]
    if time < history:
        recent = torch.cat((initial_state[:, time:], recent), dim=1)
    if ids is None:
        return recent.clone()  # a view would keep all of x alive
    return recent * (ids[:, time:] == ids[:, -1:]).unsqueeze(-1)


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial_state: Tensor | None,
    segment_ids: Tensor | None,
) -> None:
    """Raises ValueError for inputs that do not fit together."""
    if x.ndim != 3:
        raise ValueError(f"short_conv: x must be (B, T, C), got {tuple(x.shape)}")
    batch, time, channels = x.shape
    if weight.ndim != 2 or weight.shape[0] != channels or weight.shape[1] < 1:
        raise ValueError(
            f"short_conv: weight must be ({channels}, W) for x {tuple(x.shape)}, "
            f"got {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != (channels,):
        raise ValueError(f"short_conv: bias must be ({channels},), got {tuple(bias.shape)}")
    if activation not in (None, "silu"):
        raise ValueError(f"short_conv: activation must be None or 'silu', got {activation!r}")
    state_shape = (batch, weight.shape[1] - 1, channels)
    if initial_state is not None and initial_state.shape != state_shape:
        raise ValueError(
            f"short_conv: initial_state must be {state_shape}, got {tuple(initial_state.shape)}"
        )
    if segment_ids is not None and segment_ids.shape != (batch, time):
        raise ValueError(
            f"short_conv: segment_ids must be {(batch, time)}, got {tuple(segment_ids.shape)}"
        )


def _reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor,
    ids: Tensor | None,
    silu: bool,
) -> Tensor:
    """One token at a time; ids are those of the state and of x, `(B, W-1+T)`."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    width = weight.shape[1]
    inputs = torch.cat((initial_state, x), dim=1).to(dtype)
    outputs = []
    for t in range(x.shape[1]):
        window = inputs[:, t : t + width]
        if ids is not None:
            own = ids[:, t : t + width] == ids[:, t + width - 1, None]
            window = window * own.unsqueeze(-1)
        y = (window * weight.T.to(dtype)).sum(dim=1)
        outputs.append(y if bias is None else y + bias)
    y = torch.stack(outputs, dim=1)
    return (F.silu(y) if silu else y).to(x.dtype)


def _chunked(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor,
    ids: Tensor | None,
    silu: bool,
) -> Tensor:
    """W shifted multiply-adds, without transposes, in tiles that stay in cache."""
    return _ShortConv.apply(x, weight, bias, initial_state, ids, silu)


class _ShortConv(torch.autograd.Function):
    """Saves x and, with an activation, what goes into it."""

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
        taps = _taps(weight, x.dtype)
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        before = torch.empty_like(out) if silu else None
        for tile in tiles(x.shape, TILE, MIN_TILE_TIME):
            inputs = _inputs(x, initial_state, tile)
            y = inputs[:, len(taps) - 1 :] * taps[-1]
            if bias is not None:
                y.add_(bias)
            for tap in range(len(taps) - 1):
                source = inputs[:, tap : tap + y.shape[1]]
                if ids is not None:
                    source = source * _own(ids, tile, tap, len(taps), y.dtype)
                y.addcmul_(source, taps[tap])
            if before is not None:
                before[tile.rows, tile.times] = y
                F.silu(y, inplace=True)
            out[tile.rows, tile.times] = y
        ctx.save_for_backward(x, weight, bias, initial_state, ids, before)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, initial_state, ids, before = ctx.saved_tensors
        taps = _taps(weight, x.dtype)
        history = len(taps) - 1
        grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
        grad_state = torch.empty_like(initial_state)
        grad_taps = torch.zeros_like(taps)
        grad_bias = torch.zeros_like(taps[0])
        later = grad_state  # what later tiles of these rows owe to the last inputs of this one
        for tile in reversed(tiles(x.shape, TILE, MIN_TILE_TIME)):
            inputs = _inputs(x, initial_state, tile)
            part = grad[tile.rows, tile.times].to(taps.dtype)
            if before is not None:
                wide = before[tile.rows, tile.times].to(taps.dtype)
                part = torch.ops.aten.silu_backward(part, wide)
            if bias is not None:
                grad_bias += part.sum(dim=(0, 1))
            grad_inputs = torch.zeros_like(inputs)
            for tap in range(history + 1):
                span = slice(tap, tap + part.shape[1])
                seen = part
                if ids is not None and tap < history:
                    seen = part * _own(ids, tile, tap, history + 1, part.dtype)
                grad_inputs[:, span].addcmul_(seen, taps[tap])
                grad_taps[tap] += (seen * inputs[:, span]).sum(dim=(0, 1))
            if tile.times.stop < x.shape[1]:
                grad_inputs[:, part.shape[1] :] += later
            grad_x[tile.rows, tile.times] = grad_inputs[:, history:]
            later = grad_inputs[:, :history]
            if tile.times.start == 0:
                grad_state[tile.rows] = later
        return (
            grad_x,
            grad_taps.T.to(weight.dtype),
            None if bias is None else grad_bias.to(bias.dtype),
            grad_state,
            None,
            None,
        )


def _taps(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """`(W, C)`, at least float32."""
    return weight.T.to(torch.promote_types(dtype, torch.float32)).contiguous()


def _inputs(x: Tensor, initial_state: Tensor, tile: Tile) -> Tensor:
    """The inputs that a tile reads, W - 1 before it included, at least float32."""
    rows, times = tile
    history, start = initial_state.shape[1], times.start
    shape = (rows.stop - rows.start, history + times.stop - start, x.shape[2])
    inputs = x.new_empty(shape, dtype=torch.promote_types(x.dtype, torch.float32))
    carried = max(history - start, 0)
    inputs[:, :carried] = initial_state[rows, start : start + carried]
    inputs[:, carried:] = x[rows, start + carried - history : times.stop]
    return inputs


def _own(ids: Tensor, tile: Tile, tap: int, width: int, dtype: torch.dtype) -> Tensor:
    """`(rows, times, 1)`: 1 where the input under `tap` is of the output's document, else 0."""
    start, stop = tile.times.start, tile.times.stop
    source = ids[tile.rows, start + tap : stop + tap]
    output = ids[tile.rows, start + width - 1 : stop + width - 1]
    return (source == output).to(dtype).unsqueeze(-1)


IMPLEMENTATIONS = {
    "reference": _reference,
    "chunked": _chunked,
    "library": library_conv,
    "triton": _triton,
}
