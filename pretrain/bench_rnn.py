"""Sequential recurrences on this machine: `nonlinear_rnn` against a plain loop, and against
`torch.nn.LSTM` and `GRU`, in one run.

    python -m rondo.pretrain.bench_rnn [--lengths 512 2048] [--rounds 5]

Forward and backward in float32, 4 rows of 256 channels, taking turns; the best of the rounds
counts. With 4 heads the peer is the cell as one would write it, under autograd (a batched product
and the formulas, a step); gates are given. With one head it is torch's own layer, and both make
the gates of the inputs too.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rondo.kernels import nonlinear_rnn
from rondo.kernels.linear import linear
from rondo.kernels.nonlinear_rnn import CELLS, reference
from rondo.parallel.hardware import reuse_memory
from rondo.pretrain.bench import best_times
from rondo.pretrain.bench_newton import step_of

BATCH, WIDTH, HEADS = 4, 256, 4
LAYERS = {"lstm": nn.LSTM, "gru": nn.GRU}


def plain_loop(name: str, gates: Tensor, recurrent: Tensor) -> Tensor:
    """h of every position, without biases and documents."""
    step, cell = getattr(reference, name), CELLS[name]
    zeros = [gates.new_zeros(())] * len(cell.biases)
    state = [gates.new_zeros(HEADS, BATCH, WIDTH // HEADS) for _ in cell.states]
    weights = recurrent.permute(1, 3, 0, 2).flatten(2)
    outputs = []
    for x in gates.permute(1, 2, 3, 0, 4).unbind(0):
        products = (state[0] @ weights).chunk(len(cell.gates), -1)
        state = step(state, x.unbind(0), products, zeros)
        outputs.append(state[0])
    return torch.stack(outputs, 1)


def run(name: str, time: int, rounds: int) -> list[dict[str, Any]]:
    """Figures of one cell and length, against each peer it has."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    count, dim = len(CELLS[name].gates), WIDTH // HEADS
    operands = [
        draw(BATCH, time, count, HEADS, dim),
        dim**-0.5 * draw(count, HEADS, dim, dim),
    ]
    pairs: dict[str, list[Callable[[], float]]] = {
        f"plain loop, {HEADS} heads": [
            step_of(lambda *x: nonlinear_rnn(name, *x)[0], operands),
            step_of(lambda *x: plain_loop(name, *x), operands),
        ]
    }
    if name in LAYERS:
        layer = LAYERS[name](WIDTH, WIDTH, batch_first=True)
        weights = [p.detach().clone() for p in layer.parameters()]
        pairs[f"nn.{name.upper()}, 1 head"] = [
            step_of(lambda *x: own_layer(name, *x), [draw(BATCH, time, WIDTH), *weights]),
            step_of(
                lambda x, *p: torch.func.functional_call(
                    layer, dict(zip(dict(layer.named_parameters()), p, strict=True)), x
                )[0],
                [draw(BATCH, time, WIDTH), *weights],
            ),
        ]
    figures = []
    for peer, steps in pairs.items():
        ours, other = best_times(steps, rounds)
        figures.append(
            {
                "cell": name,
                "length": time,
                "peer": peer,
                "milliseconds": 1e3 * ours,
                "peer_milliseconds": 1e3 * other,
                "speedup": other / ours,
            }
        )
    return figures


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
    arguments = parser.parse_args()
    reuse_memory()
    print(f"{torch.get_num_threads()} threads")
    results = []
    for name in arguments.cells:
        for time in arguments.lengths:
            for result in run(name, time, arguments.rounds):
                results.append(result)
                print(
                    f"{name:6} {time:6} tokens {result['milliseconds']:8.1f} ms"
                    f"  {result['peer']} {result['peer_milliseconds']:8.1f} ms"
                    f" ({result['speedup']:.2f}x)",
                    flush=True,
                )
    for result in results:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
