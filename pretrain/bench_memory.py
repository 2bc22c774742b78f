"""Training speed of `kernels.neural_memory` on this machine against plain ways to write it.

    python -m rondo.pretrain.bench_memory [--rounds 5] [--only NAME] [--loop] [--peaks]

Forward and backward in float32 of all inputs, with the limits of `neural_memory` on both sides.
`peer` is the same function as one would first write it (`straightforward` below); it and, with
`--loop`, the token loop take turns with ours in one process. A ratio is the median over rounds of
their time over ours in the same round; `processor_ratio` counts processor seconds, which on one
thread (OMP_NUM_THREADS=1) other work on the machine changes least. Every peer's outputs and
gradients are compared with ours before anything is timed. `--peaks`: peak memory, each side in a
process of its own.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rondo.kernels import l2_norm, neural_memory
from rondo.parallel.hardware import reuse_memory

MAX_UPDATE, MAX_WEIGHT = 10.0, 100.0
Forward = Callable[..., Tensor]


@dataclass(frozen=True)
class Contest:
    """Sizes of one comparison; heads are 64 wide."""

    batch: int
    time: int
    heads: int
    depth: int
    expansion: int
    chunk: int
    dim: int = 64

    @property
    def name(self) -> str:
        """As `--only` takes it."""
        return f"h{self.heads}-d{self.depth}-x{self.expansion}-c{self.chunk}"

    def tensors(self) -> list[Tensor]:
        """q, k, v, learning rate, log momentum, log decay and weights, about as a new
        `titans_memory` layer makes them."""
        generator = torch.Generator().manual_seed(0)
        shape = (self.batch, self.time, self.heads)

        def draw(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator)

        q, k = (l2_norm(draw(*shape, self.dim)) for _ in range(2))
        gates = [0.1 * draw(*shape).sigmoid()]
        gates += [F.logsigmoid(draw(*shape) + start) for start in (0.85, 4.0)]
        widths = [self.dim, *[self.dim * self.expansion] * (self.depth - 1), self.dim]
        weights = [
            draw(self.heads, out, into) * into**-0.5 for into, out in itertools.pairwise(widths)
        ]
        return [q, k, draw(*shape, self.dim), *gates, *weights]


CONTESTS = [
    *(Contest(2, 2048, 4, 1, 1, chunk) for chunk in (16, 64)),
    *(Contest(2, 2048, 4, 2, expansion, chunk) for expansion in (1, 2) for chunk in (16, 64)),
    *(Contest(2, 512, 12, 2, 2, chunk) for chunk in (16, 64)),
]


def ours(contest: Contest, *tensors: Tensor, backend: str = "auto") -> Tensor:
    """Outputs `(B, T, H, D)` of `neural_memory`."""
    q, k, v, rate, momentum, decay, *weights = tensors
    return neural_memory(
        q,
        k,
        v,
        rate,
        momentum,
        decay,
        tuple(weights),
        max_update=MAX_UPDATE,
        max_weight=MAX_WEIGHT,
        chunk_size=contest.chunk,
        backend=backend,
    ).o


def token_loop(contest: Contest, *tensors: Tensor) -> Tensor:
    """The same, token by token."""
    return ours(contest, *tensors, backend="reference")


def straightforward(contest: Contest, *tensors: Tensor) -> Tensor:
    """The same as written first: in each chunk torch.func takes every token's gradient of the
    loss, the two recurrences run over weights, tokens read weights of their own, and autograd
    differentiates all of it."""
    q, k, v, rate, momentum, decay = (
        x.transpose(1, 2).flatten(0, 1).split(contest.chunk, 1) for x in tensors[:6]
    )
    weights = [w.repeat(contest.batch, 1, 1) for w in tensors[6:]]
    states = [torch.zeros_like(w) for w in weights]
    by_token = torch.func.vmap(torch.func.grad(_loss), in_dims=(None, 0, 0))
    by_row = torch.func.vmap(by_token)
    outputs = []
    for i in range(len(q)):
        if i:
            weights, states = ([_bounded(x, MAX_WEIGHT) for x in xs] for xs in (weights, states))
        x, steps = q[i], by_row(weights, k[i], v[i])
        keep, stay = (_triangle(g[i]) for g in (momentum, decay))
        for layer, u in enumerate(steps):
            s = _scan(keep, momentum[i], states[layer], -rate[i][..., None, None] * _limited(u))
            w = _scan(stay, decay[i], weights[layer], s)
            x = (w @ (F.silu(x) if layer else x)[..., None])[..., 0]
            weights[layer], states[layer] = w[:, -1], s[:, -1]
        outputs.append(x + q[i])
    o = torch.cat(outputs, 1)
    return o.unflatten(0, (contest.batch, contest.heads)).transpose(1, 2)


def _loss(weights: list[Tensor], k: Tensor, v: Tensor) -> Tensor:
    x = k
    for layer, w in enumerate(weights):
        x = w @ (F.silu(x) if layer else x)
    return (x + k - v).square().sum()


def _bounded(x: Tensor, limit: float) -> Tensor:
    return x * (limit / torch.linalg.matrix_norm(x, keepdim=True).clamp_min(limit))


def _limited(x: Tensor) -> Tensor:
    return _bounded(x, MAX_UPDATE)


def _triangle(log_gate: Tensor) -> Tensor:
    """`(N, C, C)`: product of gates from after i to t at [t, i]."""
    sums = log_gate.cumsum(1)
    return (sums[:, :, None] - sums[:, None, :]).exp().tril()


def _scan(triangle: Tensor, log_gate: Tensor, before: Tensor, x: Tensor) -> Tensor:
    """`y_t = gate_t y_{t-1} + x_t` `(N, C, out, in)`; as a product, which is faster than a loop
    over the tokens of a chunk."""
    faded = log_gate.cumsum(1).exp()[..., None] * before.flatten(1)[:, None]
    return torch.baddbmm(faded, triangle, x.flatten(2)).view_as(x)


def step(forward: Forward, contest: Contest) -> Callable[[], list[Tensor]]:
    """Forward and backward; returns outputs and gradients."""
    tensors = [x.requires_grad_() for x in contest.tensors()]
    slope = torch.randn(tensors[2].shape, generator=torch.Generator().manual_seed(1))

    def run() -> list[Tensor]:
        o = forward(contest, *tensors)
        return [o.detach(), *torch.autograd.grad(o, tensors, slope)]

    return run


def compare(expected: list[Tensor], actual: list[Tensor]) -> float:
    """Largest difference of outputs and gradients, each relative to its largest number."""
    return max(
        float((a - b).abs().max() / b.abs().max()) for a, b in zip(actual, expected, strict=True)
    )


def run(contest: Contest, peer: Forward, rounds: int) -> dict[str, Any]:
    """Figures of one contest.

    Raises:
        AssertionError: the peer computes something else.
    """
    steps = [step(ours, contest), step(peer, contest)]
    difference = compare(*(one() for one in steps))
    if difference > 1e-3:
        raise AssertionError(f"{contest.name}: {peer.__name__} differs by {difference}")
    wall, work = ([[], []], [[], []])
    for _ in range(rounds):
        for i, one in enumerate(steps):
            began = time.perf_counter(), time.process_time()
            one()
            wall[i].append(time.perf_counter() - began[0])
            work[i].append(time.process_time() - began[1])
    tokens = contest.batch * contest.time
    return {
        "contest": contest.name,
        **asdict(contest),
        "threads": torch.get_num_threads(),
        "peer": peer.__name__,
        "our_tokens_per_second": tokens / statistics.median(wall[0]),
        "their_tokens_per_second": tokens / statistics.median(wall[1]),
        "ratio": _ratio(wall),
        "processor_ratio": _ratio(work),
        "difference": difference,
    }


def _ratio(seconds: list[list[float]]) -> float:
    return statistics.median(b / a for a, b in zip(*seconds, strict=True))


SIDES: dict[str, Forward] = {f.__name__: f for f in (ours, straightforward, token_loop)}


def peak(contest: Contest, side: str) -> int:
    """Bytes a process holds at most for a step, beyond what it holds before."""
    # Large buffers go back to the system when freed, so that the peak is what was in use at once.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"}
    command = [sys.executable, "-m", "rondo.pretrain.bench_memory", "--peak", side]
    command += ["--only", contest.name]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return int(done.stdout)


def print_peak(contest: Contest, side: str) -> None:
    """Prints what `peak` returns, of this process."""
    one = step(SIDES[side], contest)
    before = _status("VmRSS")
    one()
    print(_status("VmHWM") - before)


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024


def main() -> None:
    """Runs the contests and prints one JSON object for each result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=[c.name for c in CONTESTS])
    parser.add_argument("--loop", action="store_true", help="against the token loop instead")
    parser.add_argument("--peaks", action="store_true", help="memory instead of time")
    parser.add_argument("--peak", choices=SIDES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    contests = [c for c in CONTESTS if arguments.only in (None, c.name)]
    peer = token_loop if arguments.loop else straightforward
    if arguments.peak:
        print_peak(contests[0], arguments.peak)
        return
    reuse_memory()
    for contest in contests:
        if arguments.peaks:
            sides = ("ours", peer.__name__)
            result = {"contest": contest.name, **{side: peak(contest, side) for side in sides}}
        else:
            result = run(contest, peer, arguments.rounds)
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
