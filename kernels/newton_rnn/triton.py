"""Newton's method over time on a GPU: chunks are walked along in registers (`triton_cells.py`), and
how to go on is decided as ever (`newton.py`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

from rondo.kernels.newton_rnn import blocks, chunked
from rondo.kernels.newton_rnn.cells import Cell, ParaLSTM
from rondo.kernels.newton_rnn.gradients import Gradients, Solution
from rondo.kernels.newton_rnn.neighbours import Neighbours, state_of, summary, vector
from rondo.kernels.newton_rnn.newton import Health, Passes, Policy
from rondo.kernels.newton_rnn.sweeps import Rows, Sweep
from rondo.kernels.newton_rnn.triton_cells import enter, sweep
from rondo.kernels.newton_rnn.triton_cells_back import pull
from rondo.kernels.triton_configs import Config
from rondo.kernels.triton_support import Compilation, launch

LANES = 2**16
"""Channels of all chunks that a GPU should walk along at a time."""
WIDE = 2**14
"""Channels of all rows that are enough: more than one sweep of chunks costs more than it gains."""
LEAST = 32
"""Positions of a chunk, at least."""


def chunk_size(batch: int, time: int, width: int) -> int:
    """Positions of a chunk."""
    if batch * width >= WIDE:
        return time
    return min(max(LEAST, time * batch * width // LANES), time)


@torch.compiler.disable  # how often it iterates depends on the numbers
def newton_rnn(
    cell: Cell,
    gates: Tensor,
    weights: Tensor,
    bias: Tensor | None,
    first: Tensor,
    segment_ids: Tensor | None,
    policy: Policy,
    neighbours: Neighbours | None,
) -> tuple[Tensor, Tensor, Health]:
    """Arguments and results as for `chunked.newton_rnn`; a cell of `CELLS`."""
    batch, time, _, width = gates.shape
    inputs = gates, weights, bias, first, segment_ids
    size = chunk_size(batch, time, width)
    return chunked.run(_BACKEND, cell, size, inputs, policy, neighbours)


def forward(rows: Rows, borders: Tensor, with_products: bool) -> Sweep:
    """As `sweeps.forward`."""
    variables, batch, chunks, width = borders.shape
    time = rows.gates.shape[1]
    states = borders.new_empty(variables, batch, time, width)
    ends = borders.new_empty(borders.shape)
    products = borders.new_empty(variables, *borders.shape) if with_products else None
    tensors = [*_inputs(rows), borders.contiguous(), states, ends, products]

    def start(config: Config) -> None:
        blocks = triton.cdiv(width, config["BLOCK"])
        sweep[(batch * chunks * blocks,)](
            *tensors, batch, time, rows.size, chunks, blocks, width,
            CELL=_number(rows.cell), **config,
        )  # fmt: skip

    _launch("newton_sweep", rows.gates, (variables, width), start)
    return Sweep(states, ends, products)


def entering(
    products: Tensor, rest: Tensor, first: Tensor, reverse: bool = False
) -> tuple[Tensor, Tensor]:
    """As `blocks.enter`, in reverse from the last chunk to the first; and what comes out, if `rest`
    has all chunks."""
    variables, batch, chunks, width = products.shape[1:]
    found, last = products.new_empty(products.shape[1:]), first.new_empty(first.shape)
    tensors = [products.contiguous(), rest.contiguous(), first.contiguous(), found, last]

    def start(config: Config) -> None:
        blocks = triton.cdiv(width, config["BLOCK"])
        enter[(batch * blocks,)](
            *tensors, batch, chunks, blocks, width,
            VARIABLES=variables, REVERSE=reverse, **config,
        )  # fmt: skip

    _launch("newton_borders", products, (variables, width), start)
    return found, last


def _enter(products: Tensor, rest: Tensor, first: Tensor) -> Tensor:
    return entering(products, torch.nn.functional.pad(rest, (0, 0, 0, 1)), first)[0]


def gradients(solution: Solution, last: Tensor, neighbours: Neighbours | None = None) -> Gradients:
    """As `gradients.gradients`."""
    rows, between = solution.rows, last
    batch, time, count, width = rows.gates.shape
    if neighbours is not None or time > rows.size:
        products, rest = _derivative(solution)
        if neighbours is not None:
            _, end = entering(products, rest, torch.zeros_like(last), reverse=True)
            here = summary(blocks.across(products, reverse=True), end)
            last = state_of(neighbours.after(here, vector(last)))
        between, _ = entering(products, rest, last, reverse=True)
    chunks = between.shape[2]
    at_gates = torch.empty_like(rows.gates, memory_format=torch.contiguous_format)
    at_weights = between.new_empty(len(rows.weights), batch, chunks, width)
    at_bias = None if rows.bias is None else between.new_empty(count, batch, chunks, width)
    left = between.new_empty(between.shape)
    _pull(solution, between.contiguous(), at_gates, at_weights, at_bias, None, left=left)
    bias = None if at_bias is None else at_bias.sum((1, 2))
    return Gradients(at_gates, at_weights.sum((1, 2)), bias, left[:, :, :1])


def _derivative(solution: Solution) -> tuple[Tensor, Tensor]:
    """Of what each chunk hands back: its derivative by what comes to the chunk's end, and what it
    is when that is zero."""
    variables, batch, time, width = solution.states.shape
    rest = solution.states.new_empty(variables, batch, -(-time // solution.rows.size), width)
    products = rest.new_empty(variables, *rest.shape)
    _pull(solution, None, None, None, None, products, left=rest)
    return products, rest


def _pull(solution: Solution, *chunked: Tensor | None, left: Tensor) -> None:
    """The kernel's arguments from `entering` on; `left` is the last."""
    rows = solution.rows
    variables, batch, chunks, width = left.shape
    grad = solution.at_output
    known = (
        solution.states,
        solution.before.contiguous(),
        None if grad is None else grad.contiguous(),
    )

    def start(config: Config) -> None:
        blocks = triton.cdiv(width, config["BLOCK"])
        pull[(batch * chunks * blocks,)](
            *_inputs(rows), *known, *chunked, left,
            batch, rows.gates.shape[1], rows.size, chunks, blocks, width,
            CELL=_number(rows.cell), **config,
        )  # fmt: skip

    _launch("newton_pull", rows.gates, (variables, width), start)


def _launch(
    name: str, like: Tensor, sizes: tuple[int, ...], start: Callable[[Config], None]
) -> None:
    if like.numel():
        launch(name, "*", like, sizes, start)


def _inputs(rows: Rows) -> list[Tensor | None]:
    tensors = rows.gates, rows.weights, rows.bias, rows.starts
    return [None if x is None else x.contiguous() for x in tensors]


def _number(cell: Cell) -> int:
    return int(isinstance(cell, ParaLSTM))


_BACKEND = chunked.Backend("triton", Passes(forward, _enter), gradients)


def ahead_of_time() -> list[Compilation]:
    """Both cells, with documents, of bfloat16 and float32."""
    listed = []
    states = ("weights", "bias", "borders", "states", "ends", "products", "rest", "first")
    states += ("entering", "last", "before", "grad", "at_weights", "at_bias", "left")
    types: dict[str, str] = dict.fromkeys(states, "*fp32") | {"starts": "*i1"}
    types |= dict.fromkeys(("batch", "time", "size", "chunks", "blocks", "width"), "i32")
    for cell, kind in enumerate(("*bf16", "*fp32")):
        here = types | {"gates": kind, "at_gates": kind}
        whole = {"CELL": cell, "products": None}
        summed: dict[str, Any] = {"CELL": cell, "entering": None}
        summed |= dict.fromkeys(("at_gates", "at_weights", "at_bias"))
        borders = {"VARIABLES": cell + 1, "REVERSE": True}
        for name, kernel, constants in (
            ("newton_sweep", sweep, {"CELL": cell}),
            ("newton_pull", pull, whole),
            ("newton_pull", pull, summed),
            ("newton_borders", enter, borders),
        ):
            listed.append(Compilation(name, kernel, here, constants, multiples=("width",)))
    return listed
