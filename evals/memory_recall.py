"""`python -m rondo.evals.memory_recall`: what depth, momentum and forgetting do for recall.

One `titans_memory` layer between embeddings, trained briefly. Every token writes a pair of key and
value and asks for a key that one of the last `recent` tokens wrote, its own included; the answer is
that key's newest value. A memory as it is by default (2 layers) is held against one with a single
matrix, one without momentum (η = 0) and one that never forgets (α = 0): the ablations of table 5 of
arXiv 2501.00663, which are of language models, on the task that the memory is made for.
"""

from __future__ import annotations

import statistics
import sys
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from rondo.errors import UserError, run_command
from rondo.models import MIXERS, ModelConfig, SequenceContext
from rondo.models.config import make_options
from rondo.models.init import initial_values
from rondo.pretrain.options import parse_command

USAGE = "python -m rondo.evals.memory_recall [--option value]..."
VARIANTS = ("default", "linear", "no_momentum", "no_forgetting")
WIDTH, KEYS, VALUES = 48, 32, 16
OFF = {"no_momentum": ("momentum", -30.0), "no_forgetting": ("decay", 30.0)}
"""The gate that a variant holds, and the score that closes it."""


@dataclass
class MemoryRecallConfig:
    """How long memories are trained, and on what."""

    variants: str = ",".join(VARIANTS)
    """Which memories, separated by commas: default, linear, no_momentum, no_forgetting."""
    steps: int = 500
    """Steps of training, 16 sequences each."""
    seeds: int = 3
    """Runs of each, with seeds 0, 1..."""
    tokens: int = 32
    """Pairs in a sequence."""
    recent: int = 8
    """How many tokens back a key that is asked for was written at most."""
    lr: float = 2e-2
    """Peak learning rate: 20 steps up, then linearly to 0."""
    chunk_size: int = 4
    """Of the memory."""


class Sequences(NamedTuple):
    """What tokens write, ask for and should answer, each `(B, T)`."""

    keys: Tensor
    values: Tensor
    asked: Tensor
    answers: Tensor


def draw(batch: int, config: MemoryRecallConfig, generator: torch.Generator) -> Sequences:
    """Random sequences."""
    shape, time = (batch, config.tokens), torch.arange(config.tokens)
    keys = torch.randint(KEYS, shape, generator=generator)
    values = torch.randint(VALUES, shape, generator=generator)
    back = torch.randint(config.recent, shape, generator=generator)
    asked = keys.gather(1, (time - back).clamp(min=0))
    written = (keys[:, None] == asked[:, :, None]) & (time <= time[:, None])
    newest = (written * (time + 1)).argmax(-1)
    return Sequences(keys, values, asked, values.gather(1, newest))


class Recall(nn.Module):
    """Embeddings of key, value and question, added up; the memory; scores of values."""

    def __init__(self, variant: str, config: MemoryRecallConfig, seed: int) -> None:
        super().__init__()
        sizes = ModelConfig(dim=WIDTH, pattern=["titans_memory"], init_std=0.1)
        options = {"head_dim": 16, "num_heads": 1, "conv_width": 1, "chunk_size": config.chunk_size}
        options["depth"] = 1 if variant == "linear" else 2
        mixer = MIXERS["titans_memory"]
        self.memory = mixer(sizes, make_options("titans_memory", options), 0)
        generator = torch.Generator().manual_seed(seed)
        rows = (KEYS, VALUES, KEYS)
        self.embeddings = nn.ParameterList(
            0.5 * torch.randn(n, WIDTH, generator=generator) for n in rows
        )
        self.scores = nn.Parameter(0.1 * torch.randn(VALUES, WIDTH, generator=generator))
        with torch.no_grad():
            for name, value in initial_values(self.memory, seed=seed):
                self.memory.get_parameter(name).copy_(value)
        if variant in OFF:
            gate, score = OFF[variant]
            nn.init.zeros_(self.memory.get_parameter(f"{gate}_proj.weight").requires_grad_(False))
            nn.init.constant_(
                self.memory.get_parameter(f"{gate}_bias").requires_grad_(False), score
            )

    def forward(self, batch: Sequences) -> Tensor:
        """Scores `(B, T, VALUES)`."""
        parts = zip(self.embeddings, batch[:3], strict=True)
        x = torch.stack([table[ids] for table, ids in parts]).sum(0)
        positions = torch.arange(x.shape[1]).expand(x.shape[:2])
        y, _ = self.memory(x, SequenceContext(positions=positions, segment_ids=None, shared={}))
        return y @ self.scores.T


def train(model: Recall, config: MemoryRecallConfig, seed: int) -> None:
    """AdamW on the cross-entropy of all answers."""
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=config.lr, weight_decay=0.0)
    generator = torch.Generator().manual_seed(1000 + seed)
    for step in range(config.steps):
        factor = min(1.0, (step + 1) / 20) * (1 - step / config.steps)
        optimizer.param_groups[0]["lr"] = config.lr * factor
        batch = draw(16, config, generator)
        loss = F.cross_entropy(model(batch).flatten(0, 1), batch.answers.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()


@torch.no_grad()
def accuracy(model: Recall, config: MemoryRecallConfig) -> float:
    """Share of right answers in 128 sequences that were not trained on."""
    batch = draw(128, config, torch.Generator().manual_seed(7))
    return (model(batch).argmax(-1) == batch.answers).double().mean().item()


def compare(config: MemoryRecallConfig) -> dict[str, list[float]]:
    """Accuracies of every variant by seed, shown as a table."""
    variants = config.variants.split(",")
    jobs = [(variant, seed) for variant in variants for seed in range(config.seeds)]
    found: dict[str, list[float]] = {variant: [] for variant in variants}
    for variant, seed in track(jobs, "memories", console=Console(stderr=True)):
        model = Recall(variant, config, seed)
        train(model, config, seed)
        found[variant].append(accuracy(model, config))
    table = Table("memory", "right answers by seed", "mean", title=f"chance {1 / VALUES:.3f}")
    for variant, shares in found.items():
        mean = statistics.mean(shares)
        table.add_row(variant, ", ".join(f"{x:.3f}" for x in shares), f"{mean:.3f}")
    Console().print(table)
    return found


def main(words: list[str]) -> int:
    """Runs the command; see `MemoryRecallConfig`."""
    config: Any = parse_command(MemoryRecallConfig, words, USAGE, ())
    if config is None:
        return 0
    for variant in config.variants.split(","):
        if variant not in VARIANTS:
            raise UserError(f"variants: unknown {variant!r} (known: {', '.join(VARIANTS)})")
    for name in ("steps", "seeds", "tokens", "recent", "chunk_size"):
        if getattr(config, name) < 1:
            raise UserError(f"{name}: must be at least 1, got {getattr(config, name)}")
    compare(config)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(sys.argv[1:])))
