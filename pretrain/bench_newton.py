"""Nonlinear recurrences on this machine: Newton's method against a loop over time, and against a
linear scan of the same size, in one run.

    python -m rondo.pretrain.bench_newton [--lengths 512 2048 8192] [--rounds 3]

Forward and backward in float32, 4 rows of 256 channels, taking turns; the best of the rounds
counts. The loop is the reference of `newton_rnn`: the formulas of the cell at every position, under
autograd, from gates that were cut into positions before. A loop that takes `gates[:, t]` as it goes
is timed once too, up to 2,048 tokens: autograd makes zeros of the size of all gates for the
gradient of each index, so that its time is quadratic.
"""

from __future__ import annotations

import argparse
import functools
import json
import time as clock
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rondo.kernels import linear_scan, newton_rnn
from rondo.kernels.newton_rnn import CELLS, reference
from rondo.parallel.hardware import reuse_memory
from rondo.pretrain.bench import Step, best_times

BATCH, WIDTH = 4, 256
INDEXED = 2048
"""Tokens up to which the loop over indices is timed."""


def step_of(function: Callable[..., Tensor], inputs: list[Tensor]) -> Step:
    """Outputs and gradients of `function`."""
    leaves = [x.requires_grad_() for x in inputs]

    def step() -> float:
        h = function(*leaves)
        return float(torch.autograd.grad(h, leaves, torch.ones_like(h))[0].flatten()[0])

    return step


def indexed_loop(name: str, gates: Tensor, weights: Tensor) -> Tensor:
    """h of every position, as one would write it at first."""
    step, count = getattr(reference, name), CELLS[name].variables
    state: Any = [gates.new_zeros(BATCH, WIDTH)] * count if count > 1 else gates.new_zeros(())
    outputs = []
    for t in range(gates.shape[1]):
        state = step(state, gates[:, t].unbind(1), weights.unbind(0))
        outputs.append(state[-1] if count > 1 else state)
    return torch.stack(outputs, 1)


def seconds(step: Step) -> float:
    """Of one call."""
    began = clock.perf_counter()
    step()
    return clock.perf_counter() - began


def run(time: int, rounds: int) -> list[dict[str, Any]]:
    """Figures of every cell at one length, all in turns with one linear scan."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def solved(name: str, backend: str) -> Callable[..., Tensor]:
        return lambda *x: newton_rnn(name, *x, backend=backend).h

    # The initial weights of ParaRNN: standard deviation 2 / sqrt(5 width).
    operands = {
        name: [
            draw(BATCH, time, 3, WIDTH),
            2 / (5 * WIDTH) ** 0.5 * draw(len(cell.weights), WIDTH),
        ]
        for name, cell in CELLS.items()
    }
    linear = [draw(BATCH, time, WIDTH).sigmoid(), draw(BATCH, time, WIDTH)]
    steps = [step_of(solved(name, "chunked"), operands[name]) for name in CELLS]
    steps += [step_of(solved(name, "reference"), operands[name]) for name in CELLS]
    *both, scan = best_times([*steps, step_of(lambda a, b: linear_scan(a, b)[0], linear)], rounds)
    found = []
    for name, newton, loop in zip(CELLS, both[: len(CELLS)], both[len(CELLS) :], strict=True):
        health = newton_rnn(name, *operands[name]).health
        found.append(
            {
                "cell": name,
                "length": time,
                "milliseconds": 1e3 * newton,
                "loop_milliseconds": 1e3 * loop,
                "scan_milliseconds": 1e3 * scan,
                "faster_than_loop": loop / newton,
                "slower_than_scan": newton / scan,
                "iterations": int(health.iterations),
                "residual": float(health.residual),
            }
        )
        if time <= INDEXED:
            indexed = seconds(step_of(functools.partial(indexed_loop, name), operands[name]))
            found[-1]["indexed_loop_milliseconds"] = 1e3 * indexed
            found[-1]["faster_than_indexed_loop"] = indexed / newton
    return found


def show(result: dict[str, Any]) -> None:
    """One line of the table."""
    indexed = ""
    if "indexed_loop_milliseconds" in result:
        indexed = (
            f", {result['faster_than_indexed_loop']:.0f}x that of a loop over indices"
            f" ({result['indexed_loop_milliseconds']:.0f} ms)"
        )
    print(
        f"{result['cell']:10} {result['length']:6} tokens {result['milliseconds']:8.1f} ms: "
        f"{result['faster_than_loop']:.1f}x the speed of the loop"
        f" ({result['loop_milliseconds']:.1f} ms), {result['slower_than_scan']:.1f}x the time of"
        f" linear_scan ({result['scan_milliseconds']:.1f} ms){indexed}",
        flush=True,
    )


def main() -> None:
    """Prints a table, then one JSON object a line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", nargs="+", type=int, default=[512, 2048, 8192])
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    reuse_memory()
    print(f"{torch.get_num_threads()} threads")
    results = []
    for time in arguments.lengths:
        for result in run(time, arguments.rounds):
            results.append(result)
            show(result)
    for result in results:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
