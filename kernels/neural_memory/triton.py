"""Neural memory on a GPU: products stay with the vendor's library, and what goes over whole states
is one pass of a kernel each (`triton_states.py`)."""

from __future__ import annotations

from typing import Any

import triton
from torch import Tensor

from rondo.kernels.neural_memory import chunked
from rondo.kernels.neural_memory.chunk import Passes
from rondo.kernels.neural_memory.layers import Matrices
from rondo.kernels.neural_memory.triton_states import advance as advance_kernel
from rondo.kernels.neural_memory.triton_states import advance_backward as advance_backward_kernel
from rondo.kernels.neural_memory.triton_states import scale as scale_kernel
from rondo.kernels.triton_configs import Config
from rondo.kernels.triton_support import Compilation, launch


def neural_memory(*arguments: Any) -> tuple[Tensor, list[Matrices], Tensor, Tensor]:
    """Arguments and results as for `reference.neural_memory`."""
    return chunked.neural_memory(*arguments, passes=_PASSES)


def advance(state: Tensor, carried: Tensor, written: Tensor, error: Tensor, out: Tensor) -> None:
    """As `chunk.advance`."""
    rows, (tokens, channels), width = len(state), error.shape[1:], state.shape[1] // 2
    given = [x.contiguous() for x in (state, carried, written, error)]

    def start(config: Config) -> None:
        blocks, tiles = triton.cdiv(width, config["BK"]), triton.cdiv(channels, config["BV"])
        advance_kernel[(rows * blocks * tiles,)](
            *given, out, tokens, width, channels, blocks, tiles, **config
        )

    launch("memory_advance", "*", state, (width, channels), start)


def advance_backward(state: Tensor, carried: Tensor, to_out: Tensor, to_state: Tensor) -> Tensor:
    """As `chunk.advance_backward`."""
    rows, size = len(state), state[0].numel() // 2
    found = []

    def start(config: Config) -> None:
        blocks = triton.cdiv(size, config["BLOCK"])
        found[:] = [state.new_empty(rows, blocks, 3)]
        advance_backward_kernel[(rows * blocks,)](
            state.contiguous(), carried.contiguous(), to_out.contiguous(), to_state, *found,
            size, blocks, **config,
        )  # fmt: skip

    launch("memory_advance_backward", "*", state, (size,), start)
    return found[0].sum(1)


def scale(state: Tensor, scales: Tensor) -> None:
    """As `chunk.scale`."""
    rows, size = len(state), state[0].numel() // 2

    def start(config: Config) -> None:
        blocks = triton.cdiv(size, config["BLOCK"])
        scale_kernel[(rows * 2 * blocks,)](state, scales.contiguous(), size, blocks, **config)

    launch("memory_scale", "*", state, (size,), start)


_PASSES = Passes(advance, advance_backward, scale)


def ahead_of_time() -> list[Compilation]:
    """Each kernel."""
    names = ("state", "carried", "written", "error", "out", "to_out", "to_state", "to_carried")
    types = dict.fromkeys((*names, "scales"), "*fp32")
    integers = ("tokens", "width", "channels", "blocks", "tiles", "size")
    types |= dict.fromkeys(integers, "i32")
    aligned = ("width", "channels", "size")
    return [
        Compilation(name, kernel, types, {}, multiples=aligned)
        for name, kernel in (
            ("memory_advance", advance_kernel),
            ("memory_advance_backward", advance_backward_kernel),
            ("memory_scale", scale_kernel),
        )
    ]
