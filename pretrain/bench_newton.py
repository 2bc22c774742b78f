"""Nonlinear recurrences on this machine: Newton's method against a loop over time, and against a
linear scan of the same size, in one run.

    python -m rondo.pretrain.bench_newton [--lengths 512 2048 8192] [--rounds 3]

Forward and backward in float32, 4 rows of 256 channels, taking turns; the best of the rounds
counts. The loop is the reference of `newton_rnn`: a few fused operations a step, under autograd.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rondo.kernels import linear_scan, newton_rnn
from rondo.kernels.newton_rnn import CELLS
from rondo.parallel.hardware import reuse_memory
from rondo.pretrain.bench import Step, best_times

BATCH, WIDTH = 4, 256


def step_of(function: Callable[..., Tensor], inputs: list[Tensor]) -> Step:
    """Outputs and gradients of `function`."""
    leaves = [x.requires_grad_() for x in inputs]

    def step() -> float:
        h = function(*leaves)
        return float(torch.autograd.grad(h, leaves, torch.ones_like(h))[0].flatten()[0])

    return step


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
    return found


def show(result: dict[str, Any]) -> None:
    """One line of the table."""
    print(
        f"{result['cell']:10} {result['length']:6} tokens {result['milliseconds']:8.1f} ms: "
        f"{result['faster_than_loop']:.1f}x the speed of the loop"
        f" ({result['loop_milliseconds']:.1f} ms), {result['slower_than_scan']:.1f}x the time of"
        f" linear_scan ({result['scan_milliseconds']:.1f} ms)",
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
