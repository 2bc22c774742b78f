"""Training speed of presets on one GPU: tokens a second, and products by the chip's peak (MFU).

    python -m rondo.pretrain.bench_presets [--presets NAME...] [--length 8192] [--eager]

A step is forward, mean cross-entropy, backward and fused AdamW, in bfloat16 over float32
parameters, on random tokens; the best of the rounds after warm-up counts. A model that does not fit
is tried again with half the sequences. Blocks of all presets run as they are, then compiled, which
takes longer and for which time may be up; the faster way counts. Table and JSON are written after
every measurement, and what fails is a row that says why.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rondo.errors import UserError, run_command
from rondo.kernels.bench.table import keep, triton_version
from rondo.kernels.bench.worker import Failure, Worker
from rondo.models import Decoder, ModelConfig
from rondo.models.config import from_preset
from rondo.models.init import Initializer
from rondo.parallel.hardware import peak_flops, peak_memory
from rondo.pretrain.bench import our_step

PRESETS = ("gated-deltanet-1.3b", "gated-deltanet-340m", "rmoe-0.9b")
WARMUP = 3
HEADER = "| preset | sequences | tokens/s | MFU | memory |\n| --- | --- | --- | --- | --- |"


def measure(
    config: ModelConfig, batch: int, length: int, device: torch.device, rounds: int, compiled: bool
) -> dict[str, Any]:
    """Figures of training a model of `config` on `(batch, length)` tokens."""
    with torch.device(device):
        model = Decoder(config)
        fill(model, torch.Generator(device).manual_seed(0))
    model.activation_dtype = torch.bfloat16
    if compiled:
        torch.compiler.reset()  # shapes of another model would count as ones that change
        for block in model.blocks.values():
            block.compile()
    tokens = torch.randint(config.vocab_size, (batch, length), device=device)
    step = our_step(model, tokens)
    seconds = []
    for _ in range(WARMUP + rounds):
        start = time.perf_counter()
        step()  # ends with a look at the loss: everything is done then
        seconds.append(time.perf_counter() - start)
    best = min(seconds[WARMUP:])
    speed = tokens.numel() / best
    cost = model.cost(length)
    return {
        "parameters": cost.parameters,
        "batch": batch,
        "length": length,
        "compiled": compiled,
        "tokens_per_second": speed,
        "mfu": 3 * cost.flops * speed / peak_flops(device, torch.bfloat16),
        "peak_memory": peak_memory(device),
    }


def fill(model: nn.Module, generator: torch.Generator) -> None:
    """Initial values drawn on the default device: on a CPU, a billion take half a minute."""
    with torch.no_grad():
        for param in model.parameters():
            initializer: Initializer = param.initializer  # type: ignore[attr-defined]
            param.copy_(initializer(tuple(param.shape), generator))


def fitting(
    config: ModelConfig, batch: int, length: int, device: torch.device, rounds: int, compiled: bool
) -> dict[str, Any]:
    """`measure` with the most sequences, of batch, batch / 2, ..., that fit."""
    while True:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        try:
            return measure(config, batch, length, device, rounds, compiled)
        except torch.OutOfMemoryError:
            if batch == 1:
                raise UserError(
                    f"sequences of {length} tokens do not fit; take a smaller --length"
                ) from None
        batch //= 2


def bench(options: argparse.Namespace, clock: Callable[[], float] = time.perf_counter) -> int:
    """Prints what is measured, and writes a row a preset; 1 when one has no figures."""
    if not torch.cuda.is_available():
        raise UserError("bench_presets needs a CUDA device, and there is none here")
    device, end = torch.device("cuda", 0), clock() + options.seconds
    chip, worker = torch.cuda.get_device_name(device), Worker()
    facts = {"chip": chip, "torch": torch.__version__, "triton": triton_version() or "none"}
    path = options.out / f"presets-{chip.lower().replace(' ', '-')}"
    rows: list[dict[str, Any]] = [
        {"preset": name, "modes": {}, "errors": []} for name in options.presets
    ]
    print(f"{chip}, torch {torch.__version__}\n\n{HEADER}", flush=True)
    for mode in ("eager",) if options.eager else ("eager", "compiled"):
        for i, row in enumerate(rows):
            # One that hangs leaves others time for their first figures.
            share = 0.5 if mode == "eager" and rows[i + 1 :] else 1.0
            attempt(worker, row, mode, options, device, share * (end - clock()))
            print(line(row), flush=True)
            write(path, facts, rows)
    worker.close()
    print(f"\nwritten to {path}.md and .json")
    return 1 if any(not row["modes"] for row in rows) else 0


def attempt(
    worker: Worker,
    row: dict[str, Any],
    mode: str,
    options: argparse.Namespace,
    device: torch.device,
    left: float,
) -> None:
    """Adds figures of a preset, of blocks as they are or compiled, to its row, whose own are those
    of the faster; `modes` has the tokens a second of both, `errors` says what failed. Compiled are
    as many sequences as have been found to fit."""
    if left <= 0:
        row["errors"].append(f"{mode}: the time was up")
        return
    asked = row.get("batch", options.batch), options.length, device, options.rounds
    try:
        figures = worker.ask(left, fitting, from_preset(row["preset"]), *asked, mode == "compiled")
    except Failure as failure:
        row["errors"].append(f"{mode}: {failure}")
        return
    row["modes"][mode] = figures["tokens_per_second"]
    if figures["tokens_per_second"] > row.get("tokens_per_second", 0.0):
        row |= figures


def write(path: Path, facts: dict[str, str], rows: list[dict[str, Any]]) -> None:
    """Writes table and JSON; of presets not begun yet no row."""
    begun = [row for row in rows if row["modes"] or row["errors"]]
    title = (
        f"{facts['chip']}, torch {facts['torch']}, triton {facts['triton']}; `{' '.join(sys.argv)}`"
    )
    text = "\n".join([title, "", HEADER, *map(line, begun), ""])
    keep(path, text, {**facts, "rows": begun})


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    notes = [f"{mode} {speed:,.0f}" for mode, speed in row["modes"].items()]
    note = "; ".join([*notes, *row["errors"]]).replace("|", "/")
    if not row["modes"]:
        return f"| {row['preset']} | failed: {note} | | | |"
    return (
        f"| {row['preset']} | {row['batch']} x {row['length']} "
        f"| {row['tokens_per_second']:,.0f} ({note}) | {row['mfu']:.1%} "
        f"| {row['peak_memory'] / 2**30:.1f} GiB |"
    )


def main() -> int:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m rondo.pretrain.bench_presets",
        description="Training speed of presets on one GPU: tokens a second and MFU.",
    )
    parser.add_argument("--presets", nargs="+", default=PRESETS)
    parser.add_argument("--length", type=int, default=8192, help="tokens of a sequence")
    parser.add_argument("--batch", type=int, default=4, help="sequences of a step, at most")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps")
    parser.add_argument("--seconds", type=float, default=600, help="begin nothing after this long")
    parser.add_argument("--eager", action="store_true", help="do not compile the blocks")
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks"), help="folder")
    options = parser.parse_args()
    return run_command(lambda: bench(options))


if __name__ == "__main__":
    sys.exit(main())
