"""The continual experiment: one language after another, by every recipe, in bits per byte.

    python -m rondo.evals.continual --first english/ --second german/ [--steps 250]

A base is trained on the first language; from it, runs of the same length on the second replay 0, 5,
25 and 50% of what the base has seen while they warm up again; others replay 25% without re-warming,
or go on from the constant phase of an infinite schedule. The ceiling is both languages from
scratch, on the tokens of both (arXiv 2403.08763, at a small size). Runs that are done are not run
again, and one that was interrupted goes on.

Leaves `continual.json` and `continual.html` beside the runs: bits per byte of both languages, and
what was forgotten.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from rondo.errors import UserError, run_command
from rondo.evals.run import pick_device
from rondo.models import load
from rondo.models.loading import find_checkpoint
from rondo.pretrain import load_recipe, train
from rondo.pretrain.data import bits_per_byte, count_bytes, open_dataset
from rondo.pretrain.line_chart import html_page, line_chart
from rondo.pretrain.options import parse_command
from rondo.pretrain.recipe import Recipe, SourceConfig
from rondo.pretrain.reweight import domain_names

REPLAYS = (0, 5, 25, 50)
"""Percent of the second language's samples."""
NOT_REWARMED = {"name": "cosine", "peak_ratio": 0.1, "final_ratio": 0.001}
INFINITE = {"name": "infinite_cosine", "warmup_steps": "1%", "cooldown_steps": "60%"}
ANNEALED = {
    "name": "wsd",
    "peak_ratio": 0.55,
    "decay_steps": "40%",
    "decay_shape": "exponential",
}
"""The constant phase of `INFINITE`, then an anneal."""


@dataclass
class ContinualConfig:
    """What to learn one after the other."""

    first: str
    """Corpus of the first language: anything that data.sources takes."""
    second: str
    """Corpus of the second."""
    recipe: str = "continual-german"
    """Recipe of every run but for data and schedule."""
    steps: int = 250
    """Steps on each language."""
    output: str = "runs/continual-german"
    """Folder of the runs."""
    batches: int = 16
    """Global batches of held-out text in the final measurement of each language."""
    overrides: str = ""
    """More keys of the recipe, as on a command line: "--model.dim=64 --data.micro_batch_size=4"."""


def plans(config: ContinualConfig) -> dict[str, list[str]]:
    """Overrides by name of the run, in the order in which they can run."""
    first, second = ([{"path": path}] for path in (config.first, config.second))
    output = Path(config.output)

    def base(name: str, schedule: dict[str, Any] | None = None) -> list[str]:
        words = [f"--data.sources={json.dumps(first)}", f"--name={name}"]
        return words + ([f"--schedule={json.dumps(schedule)}"] if schedule else [])

    def then(share: float, start: str = "base", schedule: Any = None) -> list[str]:
        """Without a schedule of its own it warms up again, with the optimizer begun anew."""
        stage = {
            "name": "second",
            "data": {"sources": second},
            "init_from": str(output / start),
            "replay": {"source": str(output / start), "share": share},
            "schedule": schedule,
            "reset_optimizer": schedule is None,
        }
        return [f"--data.sources={json.dumps(first)}", f"--stages={json.dumps([stage])}"]

    both = [*first, *second]
    return {
        "base": base("base"),
        **{f"replay-{share}": then(share / 100) for share in REPLAYS},
        "not-rewarmed": then(0.25, schedule=NOT_REWARMED),
        "infinite-base": base("infinite-base", INFINITE),
        "infinite": then(0.25, "infinite-base", ANNEALED),
        "union": [f"--data.sources={json.dumps(both)}", f"--steps={2 * config.steps}"],
    }


def contest(config: ContinualConfig) -> dict[str, dict[str, float]]:
    """Trains and measures all runs; bits per byte by run and language."""
    found: dict[str, dict[str, float]] = {}
    console = Console(stderr=True)
    output = Path(config.output)
    for name, words in plans(config).items():
        console.print(f"[bold]{name}[/bold]", highlight=False)
        shared = [f"--steps={config.steps}", f"--output_dir={output}", *config.overrides.split()]
        recipe = load_recipe(config.recipe, [*shared, *words, f"--name={name}"])
        if code := train(recipe):
            raise UserError(f"{name} was stopped (exit code {code}); start again to go on")
        found[name] = {
            "first": measure(output / name, recipe, config.first, config.batches),
            "second": measure(output / name, recipe, config.second, config.batches),
        }
    languages = domain_names([SourceConfig(config.first), SourceConfig(config.second)])
    (output / "continual.json").write_text(json.dumps(found, indent=1))
    (output / "continual.html").write_text(_page(found, languages), "utf-8")
    Console(width=120).print(_table(found, languages))
    return found


@torch.no_grad()
def measure(run: Path, recipe: Recipe, corpus: str, batches: int) -> float:
    """Bits per byte of a run's newest checkpoint on the held-out text of a corpus."""
    checkpoint = find_checkpoint(run)
    device = torch.device(pick_device("auto"))
    model = load(checkpoint, device).eval()
    data = dataclasses.replace(recipe.data, sources=[SourceConfig(corpus)])
    held_out = open_dataset(data, recipe.seed, "validation", model.config.vocab_size)
    lengths = held_out.tokenizer.byte_lengths()
    nats, text, size = 0.0, 0, data.global_batch_size
    for number in range(batches):
        batch = held_out.batch(range(number * size, (number + 1) * size))
        text += count_bytes(batch.targets, lengths)
        batch = batch.to(device)
        nats += float(model.loss(batch.tokens, batch.targets, segment_ids=batch.segment_ids))
    return bits_per_byte(nats, text)


def _rows(found: dict[str, dict[str, float]]) -> list[tuple[str, ...]]:
    base = found["base"]["first"]
    rows: list[tuple[str, ...]] = []
    for name, bits in found.items():
        values = [bits["first"], bits["second"], (bits["first"] + bits["second"]) / 2]
        lost = bits["first"] - (found["infinite-base"]["first"] if name == "infinite" else base)
        alone = name in ("base", "infinite-base", "union")
        rows.append((name, *(f"{v:.4f}" for v in values), "" if alone else f"{lost:+.4f}"))
    return rows


def _heads(languages: Sequence[str]) -> list[str]:
    return ["run", *languages, "mean", f"{languages[0]} forgotten"]


def _table(found: dict[str, dict[str, float]], languages: Sequence[str]) -> Table:
    table = Table(*_heads(languages), title="held-out bits per byte")
    for row in _rows(found):
        table.add_row(*row)
    return table


def _page(found: dict[str, dict[str, float]], languages: Sequence[str]) -> str:
    """Both languages over the share that is replayed, and the table."""
    keys = list(zip(("first", "second"), languages, strict=True))
    lines = {
        language: [(share, found[f"replay-{share}"][key]) for share in REPLAYS]
        for key, language in keys
    }
    for key, language in keys:
        ceiling = found["union"][key]
        lines[f"{language}, union"] = [(REPLAYS[0], ceiling), (REPLAYS[-1], ceiling)]
    low = min(value for points in lines.values() for _, value in points)
    heads = "".join(f"<th>{escape(head)}</th>" for head in _heads(languages))
    rows = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>"
        for row in _rows(found)
    )
    title = "Continual pretraining: bits per byte by percent replayed"
    picture = line_chart(lines, last=REPLAYS[-1], low=low, form=".3f", ticks=REPLAYS)
    table = f"<table><tr>{heads}</tr>{rows}</table>"
    return html_page(title, [f"<h1>{title}</h1>", picture, table])


def main(words: Sequence[str]) -> int:
    """Runs the command; see `ContinualConfig`."""
    usage = "python -m rondo.evals.continual --first CORPUS --second CORPUS [--option value]..."
    config = parse_command(ContinualConfig, words, usage)
    if config is not None:
        contest(config)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(sys.argv[1:])))
