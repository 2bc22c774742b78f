"""Times the operators on a GPU, forward and forward + backward, beside every peer that is there.

    python -m rondo.kernels.bench [--operators NAME...] [--presets 1.3b 7b] [--seconds 180]

Ours and the peers take the same inputs in the same run. Each row gives the backend that ours runs
on, milliseconds, the bytes and products an operator cannot avoid by the time it took, as shares of
what this chip does at best (a copy, a product of matrices; measured first), and how many times
faster it is than each peer. The table is written after every case. What fails is a row that says
why.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from rondo.kernels.bench import table, timing
from rondo.kernels.bench.cases import OPERATORS, PRESETS
from rondo.kernels.bench.order import Key, ordered
from rondo.kernels.bench.peers import PEERS
from rondo.kernels.bench.timing import OURS
from rondo.kernels.bench.worker import Failure, Worker

LONGEST_WAIT = 60.0
"""Seconds that one case may take of ours or of a peer, compiling and tuning included."""


class Bench:
    """Times cases in a process of their own until the time is up."""

    def __init__(
        self,
        worker: Worker,
        device: torch.device,
        best: dict[str, float],
        seconds: float,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.worker, self.device, self.best = worker, device, best
        self.clock, self.end = clock, clock() + seconds
        self.lost: dict[tuple[str, str], str] = {}
        """(operator, ours or a peer) -> why the process did not survive it, or that it is absent:
        it is not tried again."""

    def left(self) -> float:
        """Seconds."""
        return self.end - self.clock()

    def rows(self, key: Key) -> list[table.Row]:
        """A row a direction of a case, or one that says why there is none."""
        ours = self._ask(key, OURS)
        peers = {name: self._ask(key, name) for name in PEERS[key.operator]}
        named = {"operator": key.operator, "preset": key.preset}
        named["shape"] = f"{key.batch} x {key.length}"
        rows = []
        for direction in ("forward", "both"):
            row: table.Row = {**named, "direction": direction, "milliseconds": None}
            if isinstance(ours, str):
                row["error"] = ours
            else:
                spent = ours[direction]["milliseconds"]
                row |= {
                    "milliseconds": spent,
                    "bandwidth": 1e3 * ours[direction]["bytes"] / spent / self.best["bytes"],
                    "compute": 1e3 * ours[direction]["flops"] / spent / self.best["flops"],
                    "backend": ours[direction]["backend"],
                }
            row["peers"] = {
                name: found if isinstance(found, str) else found[direction]["milliseconds"]
                for name, found in peers.items()
            }
            rows.append(row)
        return rows

    def _ask(self, key: Key, party: str) -> dict[str, dict[str, Any]] | str:
        """What `timing.measure` says, or why it says nothing."""
        if (key.operator, party) in self.lost:
            return self.lost[key.operator, party]
        if self.left() <= 0:
            return "the time was up"
        seconds = min(LONGEST_WAIT, self.left())
        try:
            return self.worker.ask(seconds, timing.measure, *key, party, self.device)
        except Failure as failure:
            said = "not installed" if failure.absent else f"failed: {failure}"
            if failure.memory:
                said = "out of memory"
            if failure.absent:
                self.lost[key.operator, party] = said
            elif failure.fatal and seconds == LONGEST_WAIT:
                self.lost[key.operator, party] = f"{said} (at {key.batch} x {key.length})"
            return said

    def run(self, keys: list[Key], keep: Callable[[list[table.Row], int], None]) -> list[table.Row]:
        """Takes case after case, prints rows, and hands all so far, and how many cases are left,
        to `keep`."""
        rows: list[table.Row] = []
        for done, key in enumerate(keys, 1):
            if self.left() <= 0:
                print(f"\nthe time is up: {len(keys) - done + 1} of {len(keys)} cases left out")
                break
            found = self.rows(key)
            rows += found
            print("\n".join(map(table.line, found)), flush=True)
            keep(rows, len(keys) - done)
        return rows


def compile_all(
    operators: list[str], presets: list[str], device: torch.device, seconds: float, jobs: int
) -> None:
    """Fills the cache of compiled kernels, of ours and of peers, in some processes at once."""
    end = time.perf_counter() + seconds
    workers = [Worker() for _ in range(jobs)]
    tasks = [(o, p, party) for o in operators for p in presets for party in (OURS, *PEERS[o])]

    def work(worker: Worker) -> None:
        while tasks and time.perf_counter() < end:
            task = tasks.pop(0)
            try:
                left = min(LONGEST_WAIT, end - time.perf_counter())
                worker.ask(left, timing.compile_for, *task, device)
            except Failure as failure:
                if not failure.absent:
                    print(f"{' '.join(task)}: {failure}", flush=True)
        worker.close()

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(work, workers))


def main() -> int:
    """Prints the table and writes it, and the numbers, into a folder."""
    parser = argparse.ArgumentParser(
        prog="python -m rondo.kernels.bench",
        description="Times the operators on a GPU against every peer that is installed.",
    )
    for name, known in (("operators", list(OPERATORS)), ("presets", list(PRESETS))):
        named = ", ".join(known)
        parser.add_argument(
            f"--{name}", nargs="+", metavar="NAME", choices=known, default=known, help=named
        )
    parser.add_argument(
        "--seconds", type=float, default=180, help="begin no case after this long (%(default)s)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("docs/benchmarks"),
        help="folder of the table and the JSON (%(default)s)",
    )
    parser.add_argument(
        "--compile", action="store_true", help="only fill the cache of compiled kernels"
    )
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(2, "rondo.kernels.bench: no CUDA device here, and nothing else to time\n")
    device = torch.device("cuda", 0)
    if options.compile:
        jobs = max(1, min(6, (os.cpu_count() or 1) // 2))
        compile_all(options.operators, options.presets, device, options.seconds, jobs)
        return 0
    try:
        return time_all(options, device)
    except Failure as failure:
        parser.exit(1, f"rondo.kernels.bench: the chip's ceilings: {failure}\n")


def time_all(options: argparse.Namespace, device: torch.device) -> int:
    """Times what the command line asks for; 1 when something of ours failed."""
    start, worker = time.perf_counter(), Worker()
    chip = torch.cuda.get_device_name(device)
    try:
        best: dict[str, float] = worker.ask(LONGEST_WAIT, timing.ceilings, device)
        title = (
            f"{chip}, torch {torch.__version__}, triton {table.triton_version()}: "
            f"{best['bytes'] / 1e12:.2f} TB/s, "
            f"{best['flops'] / 1e12:.0f} TFLOP/s (bfloat16), measured; `{' '.join(sys.argv)}`"
        )
        print(f"{title}\n\n{table.HEADER}", flush=True)
        path = options.out / f"kernels-{chip.lower().replace(' ', '-')}"
        facts: dict[str, Any] = {"chip": chip, "torch": torch.__version__}
        facts |= {"triton": table.triton_version(), "best": best}
        spent = time.perf_counter() - start
        rows = Bench(worker, device, best, options.seconds - spent).run(
            ordered(options.operators, options.presets),
            lambda rows, left_out: table.write(path, title, facts, rows, left_out),
        )
    finally:
        worker.close()
    failed = {(r["operator"], r["error"]) for r in rows if "failed" in r.get("error", "")}
    for operator, error in sorted(failed):
        print(f"\n{operator}: {error}", file=sys.stderr)
    print(f"\nwritten to {path}.md and .json")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
