"""`python -m rondo.evals.short_tasks`: which layers learn to recall, and to track a state.

Every cell of the table is an ordinary run of the recipe `short-tasks`, trained on texts of the
train split and scored on those of the test split, longer ones too. A run goes on from its
checkpoints, and what was scored is kept beside it, so that the command can be stopped and started
again.
"""

from __future__ import annotations

import itertools
import json
import sys
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from rondo.errors import UserError, run_command
from rondo.evals.scoring import continuations
from rondo.evals.tasks import examples
from rondo.evals.tasks.__main__ import WriteConfig, write
from rondo.models import load
from rondo.models.loading import find_checkpoint
from rondo.pretrain.data import PrepareConfig, load_tokenizer, prepare
from rondo.pretrain.options import parse_command
from rondo.pretrain.parse import load_recipe
from rondo.pretrain.recipe import Recipe

USAGE = "python -m rondo.evals.short_tasks [--option value]..."
MARKS = "<< >>"


class Task(NamedTuple):
    """What is trained on, and what is scored."""

    sizes: str
    """Sizes of the texts to train on."""
    scored: tuple[int, ...]
    """Sizes of the texts that are scored."""
    chance: float
    """Accuracy of a guess."""
    settings: tuple[str, ...] = ()
    """What the recipe needs besides."""


TASKS = {
    # To copy, a model has to write what it read: easier with one matrix for both.
    "mqar_small": Task("1,2,4,8", (8, 16), 1 / 8, ("--model.tie_embeddings=true",)),
    "parity": Task("4,5,6,7,8,10,12,14,16", (16, 64), 1 / 2),
    "s3": Task("2,3,4,5,6,8,10,12", (12, 36), 1 / 6),
}
Found = dict[str, dict[str, list[dict[int, float]]]]
"""Accuracy by mixer, task, seed and size."""


@dataclass
class ShortTasksConfig:
    """Which cells of the table are made, and where."""

    mixers: str = "attention,previous/matching,gated_deltanet,reflecting,slstm"
    """Rows: mixers of the recipe `short-tasks`, with commas between them; a slash between those of
    the first and the second layer where they differ."""
    tasks: str = "mqar_small,parity,s3"
    """Columns: mqar_small, parity, s3."""
    seeds: int = 1
    """Runs of each; the table has the best of them."""
    examples: int = 200000
    """Texts to train on."""
    samples: int = 500
    """Texts that are scored, of each size."""
    output: str = "runs/short-tasks"
    """Folder of texts, runs and results."""
    steps: int = 2000
    """Steps of a run."""
    lr: float = 3e-3
    """Peak learning rate."""
    init_std: float = 0.02
    """Initial size of weights; attention learns to match keys sooner with 0.1."""


def table(config: ShortTasksConfig) -> int:
    """Trains, scores and writes `table.json` and `table.md`; returns an exit code of `train`.

    Raises:
        UserError: a mixer or a task is not known.
    """
    from rondo.pretrain.train import train

    folder, console = Path(config.output), Console(stderr=True)
    mixers, tasks = config.mixers.split(","), config.tasks.split(",")
    if unknown := [name for name in tasks if name not in TASKS]:
        raise UserError(f"tasks: unknown {unknown[0]!r} (known: {', '.join(TASKS)})")
    found: Found = {}
    for task, mixer, seed in itertools.product(tasks, mixers, range(config.seeds)):
        run = _recipe(config, task, mixer, seed, _data(task, config, folder))
        console.print(run.name, highlight=False)
        result = folder / run.name / "accuracy.json"
        if not result.is_file():
            if code := train(run):
                return code
            scores = accuracy(find_checkpoint(folder / run.name), task, config.samples)
            result.write_text(json.dumps(scores))
        scores = {int(size): value for size, value in json.loads(result.read_text()).items()}
        found.setdefault(mixer, {}).setdefault(task, []).append(scores)
        (folder / "table.json").write_text(json.dumps(found, indent=1))
        (folder / "table.md").write_text(markdown(found))
    print(markdown(found), end="")
    return 0


def _recipe(config: ShortTasksConfig, task: str, mixer: str, seed: int, data: Path) -> Recipe:
    words = {
        "name": f"{task}-{mixer.replace('/', '-')}-{seed}",
        "seed": seed,
        "output_dir": config.output,
        "steps": config.steps,
        "model.pattern": f"[{mixer.replace('/', ', ')}]",
        "data.sources": f"[{{path: {data}}}]",
        "optimizer.lr": config.lr,
        "model.init_std": config.init_std,
    }
    given = [f"--{key}={value}" for key, value in words.items()]
    return load_recipe("short-tasks", [*TASKS[task].settings, *given])


def _data(task: str, config: ShortTasksConfig, folder: Path) -> Path:
    """Texts to train on, as token files with the loss on answers."""
    texts, words = folder / f"{task}.jsonl", folder / f"{task}-words.json"
    folder.mkdir(parents=True, exist_ok=True)
    if not words.is_file():
        sizes = TASKS[task].sizes
        write(WriteConfig(task, str(texts), sizes, config.examples, 0, True, str(words)))
    output = str(folder / f"{task}-tokens")
    return prepare(
        PrepareConfig(
            str(texts), output, str(words), loss_marks=MARKS, validation_fraction=0.002, workers=0
        )
    )


def accuracy(checkpoint: Path, task: str, samples: int) -> dict[int, float]:
    """Share of the answers that greedy decoding would write, by size, on the test split."""
    model, tokenizer = load(checkpoint).eval(), load_tokenizer(checkpoint / "tokenizer")
    scores = {}
    for size in TASKS[task].scored:
        texts = islice(examples(task, size, "test"), samples)
        pairs = [(tokenizer.encode(t.prompt), tokenizer.encode(t.answer)) for t in texts]
        found = continuations(model, pairs, batch_size=64)
        scores[size] = sum(score.greedy for score in found) / len(found)
    return scores


def markdown(found: Found) -> str:
    """The table: the best seed of each mixer and task, in length and beyond."""
    tasks = list(dict.fromkeys(task for row in found.values() for task in row))
    heads = [f"{task} {size}" for task in tasks for size in TASKS[task].scored]
    rows = [["mixer", *heads], ["---"] * (len(heads) + 1)]
    rows.append(["chance", *(f"{TASKS[t].chance:.2f}" for t in tasks for _ in TASKS[t].scored)])
    for mixer, row in found.items():
        cells = []
        for task in tasks:
            sizes, runs = TASKS[task].scored, row.get(task, [])
            best = max(runs, key=lambda scores: [scores[size] for size in sizes], default=None)
            cells += [f"{best[size]:.3f}" if best else "" for size in sizes]
        rows.append([mixer, *cells])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def main(words: list[str]) -> int:
    """Runs the command; see `ShortTasksConfig`."""
    config = parse_command(ShortTasksConfig, words, USAGE, ())
    return 0 if config is None else table(config)


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(sys.argv[1:])))
