"""Training speed of presets on one GPU: tokens a second, and products by the chip's peak (MFU).

    python -m rondo.pretrain.bench_presets [--presets NAME...] [--length 8192] [--eager]

A step is forward, mean cross-entropy, backward and fused AdamW, in bfloat16 over float32
parameters, on random tokens; the best of the rounds after warm-up counts. A model that does not fit
is tried again with half the sequences.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from rondo.errors import UserError, run_command
from rondo.models import Decoder, ModelConfig
from rondo.models.config import from_preset
from rondo.parallel.hardware import peak_flops, peak_memory
from rondo.pretrain.bench import our_step

PRESETS = ("gated-deltanet-340m", "gated-deltanet-1.3b", "rmoe-0.9b")
WARMUP = 3


def measure(
    config: ModelConfig, batch: int, length: int, device: torch.device, rounds: int, compiled: bool
) -> dict[str, Any]:
    """Figures of training a model of `config` on `(batch, length)` tokens."""
    with torch.device(device):
        model = Decoder(config, seed=0)
    model.activation_dtype = torch.bfloat16
    if compiled:
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


def fitting(
    config: ModelConfig, batch: int, length: int, device: torch.device, rounds: int, compiled: bool
) -> dict[str, Any]:
    """`measure` with the most sequences, of batch, batch / 2, ..., that fit."""
    while True:
        try:
            return measure(config, batch, length, device, rounds, compiled)
        except torch.OutOfMemoryError:
            if batch == 1:
                raise UserError(
                    f"sequences of {length} tokens do not fit; take a smaller --length"
                ) from None
        batch //= 2
        torch.cuda.empty_cache()


def bench(options: argparse.Namespace) -> int:
    """Prints a row a preset and writes all of them into a file."""
    if not torch.cuda.is_available():
        raise UserError("bench_presets needs a CUDA device, and there is none here")
    device = torch.device("cuda", torch.cuda.current_device())
    chip, rows = torch.cuda.get_device_name(device), []
    print(f"{chip}, torch {torch.__version__}\n\n| preset | sequences | tokens/s | MFU | memory |")
    print("| --- | --- | --- | --- | --- |")
    start = time.perf_counter()
    for name in options.presets:
        if time.perf_counter() - start > options.seconds:
            print(f"\n{options.seconds:.0f} s are up: {name} and what follows are left out")
            break
        figures = fitting(
            from_preset(name), options.batch, options.length, device, options.rounds,
            not options.eager,
        )  # fmt: skip
        rows.append({"preset": name, **figures})
        print(
            f"| {name} | {figures['batch']} x {figures['length']} "
            f"| {figures['tokens_per_second']:,.0f} | {figures['mfu']:.1%} "
            f"| {figures['peak_memory'] / 2**30:.1f} GiB |",
            flush=True,
        )
        torch.cuda.reset_peak_memory_stats()
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"presets-{chip.lower().replace(' ', '-')}.json"
    path.write_text(json.dumps({"chip": chip, "torch": torch.__version__, "rows": rows}, indent=1))
    return 0


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
