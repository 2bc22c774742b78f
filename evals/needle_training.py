"""`python -m rondo.evals.needle_training`: which layers find needles beyond the length in training.

Small models learn the task from scratch and are scored on longer texts. A text is filler with a few
needles at random depths, each one word that stands for a key with its value; a question is a word
that stands for a key, and the answer, not in the text, is the value (`labelling.py`).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import NamedTuple

import torch
from rich.console import Console

from rondo.errors import UserError, run_command
from rondo.evals.labelling import NO_ANSWER, Fit, Rows, fit, score
from rondo.models import Decoder, ModelConfig
from rondo.pretrain.options import parse_command

USAGE = "python -m rondo.evals.needle_training [--option value]..."
KEYS, VALUES, FILLER = 8, 16, 16
QUESTION = KEYS * VALUES
"""The first question; before it are needles, `key * VALUES + value`."""
ANSWER = QUESTION + KEYS
"""The first answer; filler comes after the last one."""
WORDS = ANSWER + VALUES + FILLER
NEEDLES = 4
TRAINED = (16, 32, 64, 128)
"""Lengths in training, in turn: short texts are learnt first."""
FACTORS = (1, 2, 4, 8, 16)
"""Lengths that are scored, by the longest in training."""
WINDOW = 32
POOL = 20_000
"""Texts of a length to draw from in training."""


class Layers(NamedTuple):
    """A row of the table: what models differ in. Widths of MLPs make their sizes equal."""

    pattern: list[str]
    num_layers: int
    ffn_dim: int


MODELS = {
    "window": Layers(["sliding"], 2, 224),
    "gated_deltanet": Layers(["gated_deltanet"], 2, 192),
    "mal": Layers(["titans_memory+none", "window"], 4, 64),
    "mag": Layers(["titans_mag"], 2, 104),
    "lmm": Layers(["titans_memory"], 2, 152),
    "mac": Layers(["titans_mac"], 2, 96),
}
MIXERS = {
    "sliding": {"kind": "attention", "num_heads": 2, "window": WINDOW},
    "window": {"kind": "attention", "num_heads": 2, "window": WINDOW, "persistent_tokens": 4},
    "gated_deltanet": {"num_heads": 2, "head_dim": 32, "expand_v": 1},
    "titans_memory": {"head_dim": 32},
    "titans_mag": {"head_dim": 32, "window": WINDOW, "persistent_tokens": 4},
    "titans_mac": {"head_dim": 32, "segment_size": WINDOW, "persistent_tokens": 4},
}


@dataclass
class NeedleTrainingConfig:
    """Which models are trained, and for how long."""

    models: str = ",".join(MODELS)
    """Rows, with commas between them: window, gated_deltanet, mal, mag, lmm, mac."""
    steps: int = 600
    """Steps of training, 32 texts each."""
    lr: float = 1e-2
    """Peak learning rate."""
    seed: int = 0
    """Of the weights and of the order of texts."""
    samples: int = 100
    """Texts that are scored, of each length."""


def texts(count: int, length: int, ask: float, seed: int) -> Rows:
    """Random texts with `NEEDLES` needles of different keys.

    `ask` is the share of words after the first needle that are questions for one before them; 0: a
    question for each needle, in random order, at the end of the text.
    """
    draw = torch.Generator().manual_seed(seed)
    room = length if ask else length - NEEDLES
    words = ANSWER + VALUES + torch.randint(FILLER, (count, length), generator=draw)
    answers = torch.full((count, length), NO_ANSWER)
    keys = torch.rand(count, KEYS, generator=draw).argsort(1)[:, :NEEDLES]
    values = torch.randint(VALUES, (count, NEEDLES), generator=draw)
    depths = torch.rand(count, room, generator=draw).argsort(1)[:, :NEEDLES].sort(1).values
    words.scatter_(1, depths, keys * VALUES + values)
    if not ask:
        order = torch.rand(count, NEEDLES, generator=draw).argsort(1)
        words[:, room:] = QUESTION + keys.gather(1, order)
        answers[:, room:] = ANSWER + values.gather(1, order)
        return Rows(words, answers)
    before = (depths[:, None] < torch.arange(length)[:, None]).sum(-1)
    chosen = (torch.rand(count, length, generator=draw) * before).long()
    asked = torch.rand(count, length, generator=draw) < ask
    asked &= (before > 0) & (words >= ANSWER + VALUES)
    words = torch.where(asked, QUESTION + keys.gather(1, chosen), words)
    return Rows(words, torch.where(asked, ANSWER + values.gather(1, chosen), answers))


def model(name: str) -> ModelConfig:
    """The model of a row: two layers of 64, four for MAL."""
    layers = MODELS[name]
    mixers = {key: dict(options) for key, options in MIXERS.items()}
    return ModelConfig(vocab_size=WORDS, dim=64, mixers=mixers, init_std=0.125, **layers._asdict())


def accuracies(name: str, config: NeedleTrainingConfig, console: Console) -> dict[int, float]:
    """Share of right answers by length, after training."""
    pools = [texts(POOL, length, 0.25, length) for length in TRAINED]

    def say(step: int, loss: float) -> None:
        if step % 100 == 99:
            console.print(f"{name}: step {step + 1}, loss {loss:.3f}", highlight=False)

    plan = Fit(config.steps, batch_size=32, lr=config.lr)
    trained = fit(model(name), pools, plan, config.seed, say)
    lengths = [factor * TRAINED[-1] for factor in FACTORS]
    return {n: score(trained, texts(config.samples, n, 0, n + 1), 32).mean for n in lengths}


def table(config: NeedleTrainingConfig) -> None:
    """Trains, scores and prints a row of the table after the other."""
    lengths = [str(factor * TRAINED[-1]) for factor in FACTORS]
    lines = [["model", "parameters", *lengths], ["---"] * (2 + len(lengths))]
    lines.append(["chance", "", *([f"{1 / VALUES:.3f}"] * len(lengths))])
    for line in lines:
        print(f"| {' | '.join(line)} |", flush=True)
    for name in config.models.split(","):
        size = sum(p.numel() for p in Decoder(model(name), seed=0).parameters())
        found = accuracies(name, config, Console(stderr=True))
        shown = [name, f"{size:,}", *(f"{share:.3f}" for share in found.values())]
        print(f"| {' | '.join(shown)} |", flush=True)


def main(words: list[str]) -> int:
    """Runs the command; see `NeedleTrainingConfig`."""
    config = parse_command(NeedleTrainingConfig, words, USAGE, ())
    if config is None:
        return 0
    for name in config.models.split(","):
        if name not in MODELS:
            raise UserError(f"models: unknown {name!r} (known: {', '.join(MODELS)})")
    for key in ("steps", "samples"):
        if getattr(config, key) < 1:
            raise UserError(f"{key}: must be at least 1, got {getattr(config, key)}")
    table(config)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(sys.argv[1:])))
