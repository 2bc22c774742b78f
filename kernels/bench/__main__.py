"""Times the operators on a GPU, forward and forward + backward, beside every peer that is there.

    python -m rondo.kernels.bench [--operators NAME...] [--presets 1.3b 7b] [--seconds 180]

Ours and the peers take the same inputs in the same run. Each row gives milliseconds, the bytes and
products an operator cannot avoid by the time it took, as shares of what this chip does at best (a
copy, a product of matrices; measured first), and how many times faster it is than each peer.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rondo.kernels.bench.cases import LONGEST, OPERATORS, PRESETS, SHAPES, Case, make_case
from rondo.kernels.bench.peers import PEERS


def milliseconds(run: Callable[[], Any], device: torch.device, budget: float = 0.12) -> float:
    """Median time of a call, over as many as take `budget` seconds, after one that compiles."""
    run()
    once = _timed(run, device)
    times = [_timed(run, device) for _ in range(max(3, min(50, int(1e3 * budget / once))))]
    return sorted(times)[len(times) // 2]


def _timed(run: Callable[[], Any], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - start)
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    run()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last)


def ceilings(device: torch.device, size: int = 8192) -> dict[str, float]:
    """Bytes and bfloat16 FLOPs a second that a large copy and a large product reach."""
    x = torch.empty(8 * size * size, dtype=torch.bfloat16, device=device)
    y = torch.empty_like(x)
    a = torch.randn(size, size, device=device).bfloat16()
    copy = milliseconds(lambda: y.copy_(x), device)
    product = milliseconds(lambda: a @ a, device)
    return {"bytes": 2e3 * x.nbytes / copy, "flops": 2e3 * size**3 / product}


def directions(case: Case, call: Callable[..., Tensor], device: torch.device) -> dict[str, float]:
    """Milliseconds of the forward pass alone, and of both."""

    def forward() -> Tensor:
        with torch.no_grad():
            return call(**case.inputs)

    upstream = torch.ones_like(forward())

    def both() -> None:
        torch.autograd.grad(call(**case.inputs), list(case.inputs.values()), upstream)

    return {"forward": milliseconds(forward, device), "both": milliseconds(both, device)}


def measure(case: Case, device: torch.device, best: dict[str, float]) -> list[dict[str, Any]]:
    """A row a direction of a case: ours, then peers by name (a time, or why there is none)."""
    with torch.no_grad():
        output = case.run(**case.inputs)
    ours = directions(case, case.run, device)
    peers: dict[str, dict[str, float] | str] = {}
    for name, load in PEERS[case.operator].items():
        try:
            call = load()
            peers[name] = directions(case, lambda c=call, **x: c(**x, **case.extra), device)
        except ImportError:
            peers[name] = "not installed"
        except Exception as error:
            # Whatever a peer does not serve here must not end the run, and is shown.
            peers[name] = f"failed: {type(error).__name__}: {error}".splitlines()[0][:200]
    rows = []
    for direction, spent in ours.items():
        backward = direction == "both"
        flops = case.flops + backward * case.backward_flops
        rows.append(
            {
                "operator": case.operator,
                "preset": case.preset,
                "shape": f"{case.batch} x {case.time}",
                "direction": direction,
                "milliseconds": spent,
                "bandwidth": 1e3 * case.bytes(output, backward) / spent / best["bytes"],
                "compute": 1e3 * flops / spent / best["flops"],
                "peers": {n: p if isinstance(p, str) else p[direction] for n, p in peers.items()},
            }
        )
    return rows


def line(row: dict[str, Any]) -> str:
    """A row of the table: times a peer takes are given as a multiple of ours."""
    peers = [
        f"{name} {spent / row['milliseconds']:.2f}x" if isinstance(spent, float) else f"{name} -"
        for name, spent in row["peers"].items()
    ]
    return (
        f"| {row['operator']} | {row['preset']} | {row['shape']} | {row['direction']} "
        f"| {row['milliseconds']:.3f} | {row['bandwidth']:.0%} | {row['compute']:.0%} "
        f"| {', '.join(peers)} |"
    )


HEADER = (
    "| operator | preset | batch x time | pass | ms | bandwidth | FLOPs | speed over peers |\n"
    "| --- | --- | --- | --- | --- | --- | --- | --- |"
)


def run(
    operators: list[str],
    presets: list[str],
    shapes: tuple[tuple[int, int], ...],
    device: torch.device,
    best: dict[str, float],
    seconds: float,
) -> list[dict[str, Any]]:
    """Measures case by case, prints as it goes, and stops when the time is up (saying so)."""
    start, rows = time.perf_counter(), []
    cases = [(o, p, *s) for s in shapes for p in presets for o in operators]
    cases = [case for case in cases if case[3] <= LONGEST.get(case[0], case[3])]
    for done, (operator, preset, batch, length) in enumerate(cases):
        if time.perf_counter() - start > seconds:
            print(f"\n{seconds:.0f} s are up: {len(cases) - done} of {len(cases)} cases left out")
            break
        try:
            case = make_case(operator, preset, batch, length, device)
            rows += measure(case, device, best)
            print("\n".join(line(row) for row in rows[-2:]), flush=True)
        except torch.OutOfMemoryError:
            print(f"| {operator} | {preset} | {batch} x {length} | out of memory | | | | |")
        case = None
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return rows


def main() -> int:
    """Prints the table and writes it, and the numbers, into a folder."""
    parser = argparse.ArgumentParser(
        prog="python -m rondo.kernels.bench",
        description="Times the operators on a GPU against every peer that is installed.",
    )
    parser.add_argument("--operators", nargs="+", choices=OPERATORS, default=list(OPERATORS))
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=list(PRESETS))
    parser.add_argument("--seconds", type=float, default=180, help="begin no case after this long")
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks"), help="folder")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(2, "rondo.kernels.bench: no CUDA device here, and nothing else to time\n")
    device = torch.device("cuda", torch.cuda.current_device())
    chip, best = torch.cuda.get_device_name(device), ceilings(device)
    title = (
        f"{chip}, torch {torch.__version__}: {best['bytes'] / 1e12:.2f} TB/s, "
        f"{best['flops'] / 1e12:.0f} TFLOP/s (bfloat16), measured; `{' '.join(sys.argv)}`"
    )
    print(f"{title}\n\n{HEADER}", flush=True)
    rows = run(options.operators, options.presets, SHAPES, device, best, options.seconds)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"kernels-{chip.lower().replace(' ', '-')}"
    path.with_suffix(".md").write_text("\n".join([title, "", HEADER, *map(line, rows), ""]))
    path.with_suffix(".json").write_text(
        json.dumps({"chip": chip, "torch": torch.__version__, "best": best, "rows": rows}, indent=1)
    )
    print(f"\nwritten to {path}.md and .json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
