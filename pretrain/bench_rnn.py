"""Sequential recurrences on this machine: `nonlinear_rnn` against a plain loop, and against
`torch.nn.LSTM` and `GRU`, in one run.

    python -m rondo.pretrain.bench_rnn [--lengths 512 2048] [--rounds 5] [--compiled]

Forward and backward in float32, 4 rows of 256 channels, taking turns; the best of the rounds
counts. With 4 heads the peer is the cell as one would write it, under autograd (a batched product
and the formulas, a step), from gates that are given; with `--compiled` also the same with its step
compiled by `torch.compile`. With one head it is torch's own layer, and both make the gates of the
inputs too. An LSTM is timed both ways that a layer of it can run: by the loop of `nonlinear_rnn`,
and by torch's own layer a head (`kernels/nonlinear_rnn/lstm_library.py`), which makes the gates,
and so does the peer then; once from one input, and once from two, the first half of the gates
reading the one and the other half the other, as in the mixer `lstm`, whose convolved and plain
inputs are here the same numbers.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rondo.kernels import nonlinear_rnn
from rondo.kernels.linear import linear
from rondo.kernels.nonlinear_rnn import CELLS, lstm_library, reference
from rondo.parallel.hardware import reuse_memory
from rondo.pretrain.bench import best_times
from rondo.pretrain.bench_newton import step_of

BATCH, WIDTH, HEADS = 4, 256, 4
TWO_INPUTS = "torch.lstm from two inputs"
LAYERS = {"lstm": nn.LSTM, "gru": nn.GRU}


def plain_loop(name: str, gates: Tensor, recurrent: Tensor, compiled: bool = False) -> Tensor:
    """h of every position, without biases and documents."""
    cell = CELLS[name]
    zeros = [gates.new_zeros(())] * len(cell.biases)
    state = [gates.new_zeros(HEADS, BATCH, WIDTH // HEADS) for _ in cell.states]
    weights = recurrent.permute(1, 3, 0, 2).flatten(2)
    step = torch.compile(plain_step, dynamic=False) if compiled else plain_step
    outputs = []
    for x in gates.permute(1, 2, 3, 0, 4).unbind(0):
        state = step(name, list(state), x, weights, zeros)
        outputs.append(state[0])
    return torch.stack(outputs, 1)


def plain_step(
    name: str, state: list[Tensor], x: Tensor, weights: Tensor, zeros: list[Tensor]
) -> Sequence[Tensor]:
    """The states after a position."""
    products = (state[0] @ weights).chunk(len(CELLS[name].gates), -1)
    return getattr(reference, name)(state, x.unbind(0), products, zeros)


def steps_of(
    name: str, time: int, compiled: bool
) -> dict[tuple[str, str], list[Callable[[], float]]]:
    """Ours and the peer's, by what runs ours and the peer's name."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    count, dim = len(CELLS[name].gates), WIDTH // HEADS
    operands = [
        draw(BATCH, time, count, HEADS, dim),
        dim**-0.5 * draw(count, HEADS, dim, dim),
    ]
    ours = step_of(lambda *x: nonlinear_rnn(name, *x)[0], operands)
    steps = {
        ("loop", f"plain loop, {HEADS} heads"): [
            ours,
            step_of(lambda *x: plain_loop(name, *x), operands),
        ]
    }
    if compiled:
        peer = step_of(lambda *x: plain_loop(name, *x, compiled=True), operands)
        steps["loop", f"compiled loop, {HEADS} heads"] = [ours, peer]
    if name == "lstm":
        heads = [
            draw(BATCH, time, HEADS, dim),
            dim**-0.5 * draw(HEADS, count, dim, dim),
            dim**-0.5 * draw(HEADS, count, dim, dim),
        ]
        steps["torch.lstm", f"plain loop, {HEADS} heads"] = [
            step_of(library, heads),
            peer := step_of(loop_with_inputs, heads),
        ]
        steps[TWO_INPUTS, f"plain loop, {HEADS} heads"] = [step_of(two_inputs, heads), peer]
    if name in LAYERS:
        layer = LAYERS[name](WIDTH, WIDTH, batch_first=True)
        weights = [p.detach().clone() for p in layer.parameters()]
        inputs = [draw(BATCH, time, WIDTH), *weights]
        peer = step_of(
            lambda x, *p: torch.func.functional_call(
                layer, dict(zip(dict(layer.named_parameters()), p, strict=True)), x
            )[0],
            inputs,
        )
        key = f"nn.{name.upper()}, 1 head"
        steps["loop", key] = [step_of(lambda *x: own_layer(name, *x), inputs), peer]
        if name == "lstm":
            steps["torch.lstm", key] = [step_of(own_lstm, inputs), peer]
            steps[TWO_INPUTS, key] = [step_of(partial(own_lstm, call=two_inputs), inputs), peer]
    return steps


def run(name: str, time: int, rounds: int, compiled: bool = False) -> list[dict[str, Any]]:
    """Figures of one cell and length, against each peer it has."""
    figures = []
    for (form, peer), steps in steps_of(name, time, compiled).items():
        ours, other = best_times(steps, rounds)
        figures.append(
            {
                "cell": name,
                "length": time,
                "form": form,
                "peer": peer,
                "milliseconds": 1e3 * ours,
                "peer_milliseconds": 1e3 * other,
                "speedup": other / ours,
            }
        )
    return figures


def library(x: Tensor, weight: Tensor, recurrent: Tensor, bias: Tensor | None = None) -> Tensor:
    """h of inputs `(B, T, H, E)`, for matrices `(H, G, D, E or D)`."""
    bias = recurrent.new_zeros(recurrent.shape[:3]) if bias is None else bias
    return lstm_library.lstm(x, weight, recurrent, bias, None, None)[0]


def two_inputs(x: Tensor, weight: Tensor, recurrent: Tensor, bias: Tensor | None = None) -> Tensor:
    """`library` with a second input beside x, as the mixer `lstm` calls it: each half of the gates
    has zeros for the input of the other half."""
    first, second = weight.chunk(2, 1)
    width = x.shape[-1]
    weight = torch.cat((F.pad(first, (0, width)), F.pad(second, (width, 0))), 1)
    return library(torch.cat((x, x), -1), weight, recurrent, bias)


def loop_with_inputs(x: Tensor, weight: Tensor, recurrent: Tensor) -> Tensor:
    """The plain loop from the same operands."""
    gates = torch.einsum("bthi,hgoi->btgho", x, weight)
    return plain_loop("lstm", gates, recurrent.transpose(0, 1))


def own_lstm(
    x: Tensor,
    inputs: Tensor,
    recurrent: Tensor,
    bias: Tensor,
    other: Tensor,
    call: Callable[..., Tensor] = library,
) -> Tensor:
    """torch's layer with one head, from its parameters, by `library` or `two_inputs`."""
    split = (1, 4, WIDTH)
    matrices = (m.unflatten(0, split) for m in (inputs, recurrent, bias + other))
    return call(x.unsqueeze(2), *matrices)


def own_layer(
    name: str, x: Tensor, inputs: Tensor, recurrent: Tensor, bias: Tensor, other: Tensor
) -> Tensor:
    """torch's layer with one head, from its parameters."""
    split = (len(CELLS[name].gates), 1, WIDTH)
    bias, other = bias.unflatten(0, split), other.unflatten(0, split)
    if name == "gru":
        bias = torch.cat((bias[:2] + other[:2], bias[2:], other[2:]))
    else:
        bias = bias + other
    gates = linear(x, inputs).unflatten(2, split)
    return nonlinear_rnn(name, gates, recurrent.unflatten(0, split), bias=bias)[0]


def main() -> None:
    """Prints a table, then one JSON object a line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cells", nargs="+", choices=list(CELLS), default=list(CELLS))
    parser.add_argument("--lengths", nargs="+", type=int, default=[512, 2048])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compiled", action="store_true", help="a compiled plain loop too")
    arguments = parser.parse_args()
    reuse_memory()
    print(f"{torch.get_num_threads()} threads")
    results = []
    for name in arguments.cells:
        for time in arguments.lengths:
            for result in run(name, time, arguments.rounds, arguments.compiled):
                results.append(result)
                print(
                    f"{name:6} {time:6} tokens {result['milliseconds']:8.1f} ms"
                    f" by {result['form']},"
                    f"  {result['peer']} {result['peer_milliseconds']:8.1f} ms"
                    f" ({result['speedup']:.2f}x)",
                    flush=True,
                )
    for result in results:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
