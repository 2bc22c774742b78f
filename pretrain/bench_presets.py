"""Training speed of presets on one GPU: tokens a second, and products by the chip's peak (MFU).

    python -m rondo.pretrain.bench_presets [--presets NAME...] [--length 8192] [--eager]

A step is forward, mean cross-entropy, backward and fused AdamW, in bfloat16 over float32
parameters, on random tokens; the best of the rounds after warm-up counts. A model that does not fit
is tried again with half the sequences. Blocks run as they are, then compiled, and the faster way
counts. Figures are written after each preset, and what fails is a row that says why.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rondo.errors import UserError, run_command
from rondo.kernels.bench.worker import Failure, Worker
from rondo.models import Decoder, ModelConfig
from rondo.models.config import from_preset
from rondo.parallel.hardware import peak_flops, peak_memory
from rondo.pretrain.bench import our_step

PRESETS = ("gated-deltanet-1.3b", "gated-deltanet-340m", "rmoe-0.9b")
WARMUP = 3


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
            param.copy_(param.initializer(tuple(param.shape), generator))  # type: ignore


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


def bench(options: argparse.Namespace) -> int:
    """Prints a row a preset and writes all of them into a file; 1 when one has no figures."""
    if not torch.cuda.is_available():
        raise UserError("bench_presets needs a CUDA device, and there is none here")
    device, end = torch.device("cuda", 0), time.perf_counter() + options.seconds
    chip, worker = torch.cuda.get_device_name(device), Worker()
    rows: list[dict[str, Any]] = []
    print(f"{chip}, torch {torch.__version__}\n\n| preset | sequences | tokens/s | MFU | memory |")
    print("| --- | --- | --- | --- | --- |")
    for name in options.presets:
        if time.perf_counter() > end:
            print(f"\n{options.seconds:.0f} s are up: {name} and what follows are left out")
            break
        rows.append({"preset": name, **attempts(worker, name, options, device, end)})
        print(line(rows[-1]), flush=True)
        options.out.mkdir(parents=True, exist_ok=True)
        path = options.out / f"presets-{chip.lower().replace(' ', '-')}.json"
        found = {"chip": chip, "torch": torch.__version__, "rows": rows}
        path.write_text(json.dumps(found, indent=1))
    worker.close()
    return 1 if any(not row["modes"] for row in rows) else 0


def attempts(
    worker: Worker, name: str, options: argparse.Namespace, device: torch.device, end: float
) -> dict[str, Any]:
    """Figures of a preset, of blocks as they are or compiled, whichever is faster; `modes` has the
    tokens a second of both, `errors` says what failed. Compiling takes longest, so it comes last,
    with as many sequences as have been found to fit."""
    best: dict[str, Any] = {}
    modes: dict[str, float] = {}
    errors: list[str] = []
    config, batch = from_preset(name), options.batch
    for mode in ("eager",) if options.eager else ("eager", "compiled"):
        left = end - time.perf_counter()
        if left <= 0:
            errors.append(f"{mode}: the time was up")
            break
        asked = config, batch, options.length, device, options.rounds, mode == "compiled"
        try:
            figures = worker.ask(left, fitting, *asked)
        except Failure as failure:
            errors.append(f"{mode}: {failure}")
            continue
        batch, modes[mode] = figures["batch"], figures["tokens_per_second"]
        best = max(best, figures, key=lambda each: each.get("tokens_per_second", 0.0))
    return {**best, "modes": modes, "errors": errors}


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
    parser.add_argument(
        "--seconds", type=float, default=600, help="begin no preset after this long"
    )
    parser.add_argument("--eager", action="store_true", help="do not compile the blocks")
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks"), help="folder")
    options = parser.parse_args()
    return run_command(lambda: bench(options))


if __name__ == "__main__":
    sys.exit(main())
