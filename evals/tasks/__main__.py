"""`python -m rondo.evals.tasks`: texts with answers to train on, as JSON lines."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from rich.console import Console
from rich.progress import track

from rondo.errors import UserError, run_command
from rondo.evals.tasks import examples
from rondo.pretrain.options import parse_command

USAGE = "python -m rondo.evals.tasks KIND --output FILE [--option value]..."


@dataclass
class WriteConfig:
    """What to write."""

    kind: str
    """parity, modular_arithmetic, s3, s5, delayed_match, mqar, mqar_twice or path_finding."""
    output: str
    """JSON lines file; `rondo prepare --input FILE` reads it."""
    sizes: str = "12,16,20"
    """Sizes with commas between them, in turn."""
    examples: int = 10000
    """Lines."""
    seed: int = 0
    """Seeds the texts."""


def write(config: WriteConfig) -> Path:
    """Writes texts of the train split, none of which a task scores.

    Raises:
        UserError: kind or size is impossible.
    """
    try:
        sizes = [int(size) for size in config.sizes.split(",")]
    except ValueError:
        raise UserError(f"sizes: expected numbers and commas, got {config.sizes!r}") from None
    streams = [examples(config.kind, size, "train", seed=config.seed) for size in sizes]
    turns = (next(stream) for _ in iter(int, 1) for stream in streams)
    path, console = Path(config.output), Console(stderr=True)
    with path.open("w") as file:
        count = config.examples
        for each in track(islice(turns, count), "texts", total=count, console=console):
            file.write(json.dumps({"text": each.prompt + each.answer}) + "\n")
    return path


def main(words: list[str]) -> int:
    """Runs the command; see `WriteConfig`."""
    config = parse_command(WriteConfig, words, USAGE, ("kind",))
    if config is not None:
        write(config)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(sys.argv[1:])))
