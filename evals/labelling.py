"""Small models that are trained to give the answer beside each word, and scored on longer texts.

What `pretrain/` trains predicts the next word. Here the answer is not in the text, so that every
position can ask for it without telling the next one: many more answers a token, and no search for
where the question is.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rondo.evals.tasks import labelled
from rondo.models import Decoder, ModelConfig
from rondo.pretrain import keep_bounds

NO_ANSWER = -100
WINDOW = 10
"""Steps at one length before it grows."""


class Rows(NamedTuple):
    """Texts of one size."""

    words: Tensor
    """`(N, T)` int64."""
    answers: Tensor
    """`(N, T)` int64; -100 where nothing is asked."""


@dataclass
class Fit:
    """How a model is trained."""

    steps: int
    batch_size: int = 64
    """Texts of a step."""
    words: int = 0
    """Words of a step at least: where texts are short, more than `batch_size` of them."""
    lr: float = 3e-3
    """Peak of a cosine that begins with 5% warm-up and ends with 1% of it."""
    init_std: float = 0.125
    """Standard deviation of matrices at the start (`ModelConfig.init_std`)."""
    first: int | None = None
    """Positions of a text that count at first; they grow to all of them in the first half of
    training, or as `grow_below` has it. None: all from the start."""
    grow_below: float | None = None
    """Loss in nats, mean of `WINDOW` steps, below which a quarter more positions count."""


@functools.cache
def vocabulary(kind: str) -> dict[str, int]:
    """A number for each word of a task and each answer."""
    words: set[str] = set()
    for row, answers in islice(labelled(kind, 16, "train"), 2000):
        words.update(row, (a for a in answers if a is not None))
    return {word: number for number, word in enumerate(sorted(words))}


@functools.cache
def rows(kind: str, size: int, split: str, count: int, seed: int) -> Rows:
    """`count` texts of a split; a function of its arguments."""
    numbers = vocabulary(kind)
    texts = list(islice(labelled(kind, size, split, seed=seed), count))
    words = [[numbers[word] for word in row] for row, _ in texts]
    answers = [[NO_ANSWER if a is None else numbers[a] for a in row] for _, row in texts]
    return Rows(torch.tensor(words), torch.tensor(answers))


def fit(
    config: ModelConfig, pools: list[Rows], plan: Fit, seed: int, say: Callable[[int, float], None]
) -> Decoder:
    """A model trained on texts drawn from `pools`, a pool a step, each as often; `say` is told the
    step and its mean loss in nats."""
    model = Decoder(config, seed=seed).train()
    draw = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=plan.lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True
    )
    lengths = Lengths(plan)
    for step in range(plan.steps):
        pool = pools[step % len(pools)]
        length = lengths.at(step, pool.words.shape[1])
        count = max(plan.batch_size, plan.words // length)
        index = torch.randint(len(pool.words), (count,), generator=draw)
        words, answers = pool.words[index, :length], pool.answers[index, :length]
        loss = model.loss(words, answers, reduction="mean")
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = plan.lr * _share(step, plan.steps)
        optimizer.step()
        keep_bounds([model])
        lengths.note(loss.item())
        say(step, loss.item())
    return model


def _share(step: int, steps: int) -> float:
    warmup = max(1, steps // 20)
    if step < warmup:
        return (step + 1) / warmup
    return 0.01 + 0.99 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))) / 2


class Lengths:
    """How many positions of a text count."""

    def __init__(self, plan: Fit) -> None:
        self.plan, self.learnt = plan, plan.first or 0
        self.losses: list[float] = []

    def at(self, step: int, full: int) -> int:
        """In a step, of texts of `full` positions."""
        first = self.plan.first
        if first is None:
            return full
        if self.plan.grow_below is not None:
            return min(full, self.learnt)
        return min(full, round(first + (full - first) * 2 * step / self.plan.steps))

    def note(self, loss: float) -> None:
        """Takes the loss of a step in nats, and grows where the last ones are small."""
        below = self.plan.grow_below
        self.losses = [*self.losses[1 - WINDOW :], loss]
        if below is None or len(self.losses) < WINDOW or sum(self.losses) >= below * WINDOW:
            return
        self.learnt += max(1, self.learnt // 4)
        self.losses = []


class Score(NamedTuple):
    """Share of right answers."""

    mean: float
    """Of all answers."""
    last: float
    """Of the last one of each text."""


@torch.no_grad()
def hits(model: Decoder, texts: Rows, batch_size: int = 128) -> Tensor:
    """Where the likeliest word is the answer `(N, T)`."""
    model.eval()
    parts = zip(*(x.split(batch_size) for x in texts), strict=True)
    return torch.cat(
        [
            model.logits(model(words, return_state=False).hidden).argmax(-1) == answers
            for words, answers in parts
        ]
    )


def score(model: Decoder, texts: Rows, batch_size: int = 128) -> Score:
    """How often the likeliest word is the answer."""
    right = hits(model, texts, batch_size)
    asked = int((texts.answers != NO_ANSWER).sum())
    return Score(int(right.sum()) / asked, int(right[:, -1].sum()) / len(texts.words))
