"""Whether a model copies what it has just read: the loss on a paragraph that comes again and again.

Reading a small part of the data very often harms copying first (arXiv 2205.10487, whose test is a
paragraph eleven times): a healthy model's loss falls sharply at the second copy. Paragraphs are
random tokens, which can only be copied, and text.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from rondo.errors import UserError, run_command
from rondo.evals.scoring import token_log_likelihoods
from rondo.models import Decoder, load
from rondo.models.loading import find_checkpoint
from rondo.pretrain.data import Tokenizer, load_tokenizer
from rondo.pretrain.data.corpora import open_corpus
from rondo.pretrain.options import parse_command

_BETWEEN = "\n"


@dataclass
class CopiesConfig:
    """What is copied, by whom."""

    checkpoint: str
    """A checkpoint, or the folder of a run (its newest one)."""
    copies: int = 11
    """How often a paragraph is read."""
    paragraphs: int = 8
    """Paragraphs of each kind."""
    tokens: int = 64
    """Tokens of a paragraph."""
    text: str = "stdlib-english"
    """Where paragraphs of text come from: anything that data.sources takes."""
    output: str | None = None
    """File for the losses; None: copies.json in the run folder."""
    seed: int = 0
    """Of the random tokens."""


def copy_losses(
    model: Decoder, start: Sequence[int], paragraph: Sequence[int], copies: int
) -> list[float]:
    """Mean loss of each copy of `paragraph`, nats a token, read one after the other behind `start`;
    all are token ids, and `start` has at least one."""
    nats = -token_log_likelihoods(model, [*start, *list(paragraph) * copies])[len(start) - 1 :]
    return nats.double().view(copies, len(paragraph)).mean(1).tolist()


def paragraphs(config: CopiesConfig, tokenizer: Tokenizer) -> dict[str, list[list[int]]]:
    """Paragraphs of `config.tokens` tokens by kind. Raises UserError where the text has too few."""
    draw, words = random.Random(config.seed), range(tokenizer.vocab_size)
    usable = [token for token in words if token != tokenizer.eod]
    read = (tokenizer.encode(text) for text in open_corpus(config.text).documents())
    long = (ids[: config.tokens] for ids in read if len(ids) >= config.tokens)
    texts = [*islice(long, config.paragraphs)]
    if not texts:
        raise UserError(f"text: {config.text} has no document of {config.tokens} tokens")
    made = [draw.choices(usable, k=config.tokens) for _ in range(config.paragraphs)]
    return {"random": made, "text": texts}


def score(config: CopiesConfig) -> dict[str, list[float]]:
    """Mean loss by kind of paragraph and copy, shown as a table and written as JSON. Raises
    UserError where there is no checkpoint or no text."""
    for name in ("copies", "paragraphs", "tokens"):
        if getattr(config, name) < 1:
            raise UserError(f"{name}: must be at least 1, got {getattr(config, name)}")
    folder = find_checkpoint(Path(config.checkpoint))
    model, tokenizer = load(folder).eval(), load_tokenizer(folder / "tokenizer")
    between = tokenizer.encode(_BETWEEN)
    found = {}
    for kind, texts in paragraphs(config, tokenizer).items():
        rows = [
            copy_losses(model, [tokenizer.eod, *between], [*text, *between], config.copies)
            for text in track(texts, kind, console=Console(stderr=True))
        ]
        found[kind] = torch.tensor(rows, dtype=torch.float64).mean(0).tolist()
    table = Table("copy", *found, title=f"{folder}: loss, nats a token")
    for number, losses in enumerate(zip(*found.values(), strict=True), start=1):
        table.add_row(str(number), *(f"{loss:.4f}" for loss in losses))
    Console().print(table)
    path = Path(config.output) if config.output else folder.parent.parent / "copies.json"
    path.write_text(json.dumps({"checkpoint": str(folder), "loss": found}, indent=1))
    return found


def main(words: Sequence[str]) -> int:
    """Runs the command; see `CopiesConfig`."""
    usage = "python -m rondo.evals.copies CHECKPOINT [--option value]..."
    config = parse_command(CopiesConfig, words, usage, ("checkpoint",))
    if config is not None:
        score(config)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(sys.argv[1:])))
