"""`python -m rondo.evals.needle_training`: which layers find needles beyond the length in training.

Small models learn the task from scratch and are scored on longer texts. A text is filler with a few
needles at random depths, each one word that stands for a key with its value; a question is a word
that stands for a key, and the answer, not in the text, is the value (`labelling.py`). Among the
needles is a passkey: three words in a row, each one of 16 for its place. The end of a text asks for
it by one word; the answer is the same three words, of which each is read before the next is given.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from rondo.errors import UserError, run_command
from rondo.evals.labelling import NO_ANSWER, Fit, Rows, fit, hits
from rondo.models import Decoder, ModelConfig
from rondo.pretrain.options import parse_command

USAGE = "python -m rondo.evals.needle_training [--option value]..."
KEYS, VALUES, FILLER = 8, 16, 16
QUESTION = KEYS * VALUES
"""The first question; before it are needles, `key * VALUES + value`."""
PLACES = 3
"""Words of a passkey."""
PASSKEY = QUESTION + KEYS
"""The first of them, `place * VALUES + value`."""
ASK = PASSKEY + PLACES * VALUES
"""Asks for the passkey."""
ANSWER = ASK + 1
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
    """Random texts with `NEEDLES` needles of different keys and a passkey, which is asked for in
    the last `PLACES` positions.

    `ask` is the share of words after the first needle that are questions for one before them; 0: a
    question for each needle, in random order, before the one for the passkey.
    """
    draw = torch.Generator().manual_seed(seed)
    end = length - PLACES
    room = end if ask else end - NEEDLES
    words = ANSWER + VALUES + torch.randint(FILLER, (count, length), generator=draw)
    answers = torch.full((count, length), NO_ANSWER)
    depths = _hide_passkeys(words, answers, room, draw)
    keys = torch.rand(count, KEYS, generator=draw).argsort(1)[:, :NEEDLES]
    values = torch.randint(VALUES, (count, NEEDLES), generator=draw)
    words.scatter_(1, depths, keys * VALUES + values)
    if not ask:
        order = torch.rand(count, NEEDLES, generator=draw).argsort(1)
        words[:, room:end] = QUESTION + keys.gather(1, order)
        answers[:, room:end] = ANSWER + values.gather(1, order)
        return Rows(words, answers)
    before = (depths[:, None] < torch.arange(length)[:, None]).sum(-1)
    chosen = (torch.rand(count, length, generator=draw) * before).long()
    asked = torch.rand(count, length, generator=draw) < ask
    asked &= (before > 0) & (words >= ANSWER + VALUES)
    words = torch.where(asked, QUESTION + keys.gather(1, chosen), words)
    return Rows(words, torch.where(asked, ANSWER + values.gather(1, chosen), answers))


def _hide_passkeys(words: Tensor, answers: Tensor, room: int, draw: torch.Generator) -> Tensor:
    """Puts a passkey somewhere in the first `room` words of each text and the question at its end;
    returns depths for needles beside it `(N, NEEDLES)`, in order."""
    count = len(words)
    values = torch.randint(VALUES, (count, PLACES), generator=draw)
    passkeys = PASSKEY + VALUES * torch.arange(PLACES) + values
    # Places where the passkey counts as one word.
    places = torch.rand(count, room - PLACES + 1, generator=draw).argsort(1)
    start, depths = places[:, :1], places[:, 1 : NEEDLES + 1].sort(1).values
    words.scatter_(1, start + torch.arange(PLACES), passkeys)
    words[:, -PLACES:] = F.pad(passkeys[:, :-1], (1, 0), value=ASK)
    answers[:, -PLACES:] = passkeys
    return depths + (PLACES - 1) * (depths > start)


def model(name: str) -> ModelConfig:
    """The model of a row: two layers of 64, four for MAL."""
    layers = MODELS[name]
    mixers = {key: dict(options) for key, options in MIXERS.items()}
    return ModelConfig(vocab_size=WORDS, dim=64, mixers=mixers, init_std=0.125, **layers._asdict())


class Found(NamedTuple):
    """What a model finds in texts of one length."""

    needles: float
    """Share of needles."""
    passkeys: float
    """Share of passkeys, right in all words. Each is asked for with the right words before it,
    which is greedy decoding as far as the first wrong one."""


def found(trained: Decoder, asked: Rows) -> Found:
    """Scores `texts` that ask at their end."""
    right = hits(trained, asked, 32)
    passkeys, needles = right[:, -PLACES:], right[:, -PLACES - NEEDLES : -PLACES]
    return Found(needles.double().mean().item(), passkeys.all(1).double().mean().item())


def accuracies(name: str, config: NeedleTrainingConfig, console: Console) -> list[Found]:
    """What a model finds after training, for each of `FACTORS`."""
    pools = [texts(POOL, length, 0.25, length) for length in TRAINED]

    def say(step: int, loss: float) -> None:
        if step % 100 == 99:
            console.print(f"{name}: step {step + 1}, loss {loss:.3f}", highlight=False)

    plan = Fit(config.steps, batch_size=32, lr=config.lr)
    trained = fit(model(name), pools, plan, config.seed, say)
    return [found(trained, texts(config.samples, n, 0, n + 1)) for n in _lengths()]


def _lengths() -> list[int]:
    return [factor * TRAINED[-1] for factor in FACTORS]


def table(config: NeedleTrainingConfig) -> None:
    """Trains, scores and prints two rows of the table for each model, one after the other."""
    count = len(FACTORS)
    _print("model", "parameters", "asked for", *map(str, _lengths()))
    _print(*["---"] * (3 + count))
    _print("chance", "", "needles", *[f"{1 / VALUES:.3f}"] * count)
    _print("chance", "", "passkey", *[f"{VALUES**-PLACES:.3f}"] * count)
    for name in config.models.split(","):
        size = sum(p.numel() for p in Decoder(model(name), seed=0).parameters())
        scores = accuracies(name, config, Console(stderr=True))
        _print(name, f"{size:,}", "needles", *(f"{each.needles:.3f}" for each in scores))
        _print(name, f"{size:,}", "passkey", *(f"{each.passkeys:.3f}" for each in scores))


def _print(*cells: str) -> None:
    print(f"| {' | '.join(cells)} |", flush=True)


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
