"""`python -m rondo.evals.tasks`: texts with answers to train on, as JSON lines."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

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
    """parity, cycle_navigation, modular_arithmetic, s3, s5, a5, s5_generators, a5_generators,
    delayed_match, mqar_64 (or 128, 256, 512, 1024), mqar_small_64..., mqar_zeros_64..., mqar_all,
    recall, recall_small, recall_twice or path_finding."""
    output: str
    """JSON lines file; `rondo prepare --input FILE` reads it."""
    sizes: str = "12,16,20"
    """Sizes with commas between them, in turn."""
    examples: int = 10000
    """Lines."""
    seed: int = 0
    """Seeds the texts."""
    marks: bool = False
    """Put << >> around answers, for `rondo prepare --loss_marks '<< >>'`: loss on answers only."""
    words: str | None = None
    """A tokenizer.json to write, with a token for each word of the texts (`rondo prepare
    --tokenizer` reads it); bytes serve as well, but make texts longer."""


def write(config: WriteConfig) -> Path:
    """Writes texts of the train split, none of which a task scores; the path of them.

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
    words: dict[str, None] = {}
    with path.open("w") as file:
        count = config.examples
        for each in track(islice(turns, count), "texts", total=count, console=console):
            words.update(dict.fromkeys((each.prompt + each.answer).split()))
            answer = f"<<{each.answer}>>" if config.marks else each.answer
            file.write(json.dumps({"text": each.prompt + answer}) + "\n")
    if config.words is not None:
        Path(config.words).write_text(json.dumps(word_tokenizer(list(words)), indent=1))
    return path


def word_tokenizer(words: list[str]) -> dict[str, Any]:
    """A Hugging Face tokenizer.json with one token a word, words being parted by spaces."""
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    names = ["<|endoftext|>", "<unk>", *sorted(words)]
    return {
        "version": "1.0",
        "added_tokens": [{"id": 0, "content": names[0], "special": True, **special}],
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {
            "type": "WordLevel",
            "vocab": {name: i for i, name in enumerate(names)},
            "unk_token": "<unk>",
        },
    }


def main(words: list[str]) -> int:
    """Runs the command; see `WriteConfig`."""
    config = parse_command(WriteConfig, words, USAGE, ("kind",))
    if config is not None:
        write(config)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(sys.argv[1:])))
