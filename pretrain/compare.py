"""`rondo compare`: the same recipe with different values of one key, over several seeds, judged by
the unweighted held-out loss of every source at equal steps.

Every run is an ordinary run, `<output_dir>/<name>/<value>-seed<n>`, which goes on from its own
checkpoints; what a checkpoint scored is kept beside it. So the command can be stopped at any time
and started again. Runs of one seed share their initial parameters and the order of their data,
which is why differences are taken seed by seed.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from rondo.errors import UserError
from rondo.models import load
from rondo.models.decoder import Decoder
from rondo.parallel.checkpoint.files import step_folder
from rondo.parallel.mesh import rank_device, world_size
from rondo.pretrain.compare_report import Scores, markdown, page, results
from rondo.pretrain.data import DataError, Sources, TokenDataset, prepare_sources
from rondo.pretrain.options import help_text, split_arguments
from rondo.pretrain.parse import load_recipe
from rondo.pretrain.recipe import Recipe
from rondo.pretrain.reweight import domain_names
from rondo.pretrain.run_data import require_same_recipe
from rondo.pretrain.stages import all_sources, total_steps

USAGE = "rondo compare RECIPE --vary KEY VALUE VALUE... [--seeds N] [--section.key value]..."
_DESCRIPTION = """\
Trains RECIPE with each VALUE of KEY and N seeds, one run after the other, and writes the
unweighted held-out loss of every source at every checkpoint as compare.json, compare.md and
compare.html. The first VALUE is the one that the others are held against."""
_CHUNK = 8


@dataclass
class CompareConfig:
    """What is compared."""

    recipe: str
    """Recipe file, or the name of a bundled recipe."""
    vary: str
    """Key of the recipe, and its values as further words: reweight.strategy uniform linupper."""
    seeds: int = 3
    """Runs of each value, with the recipe's seed and the numbers after it."""


def main(words: Sequence[str]) -> int:
    """Compares what a command line says. 0: done; 75: a signal stopped a run after a checkpoint."""
    if split_arguments(words).wants_help:
        print(help_text(CompareConfig, USAGE, _DESCRIPTION), end="")
        return 0
    recipe, key, values, seeds, overrides = parse_words(words)
    return compare(recipe, key, values, seeds, overrides)


def parse_words(words: Sequence[str]) -> tuple[str, str, list[str], int, list[str]]:
    """Recipe, key, values, number of seeds and overrides of a command line.

    Raises UserError for what is missing, and for values that are given twice.
    """
    rest = list(words)
    if "--vary" not in rest:
        raise UserError(f"vary: required; usage: {USAGE}")
    start = rest.index("--vary")
    end = next((i for i in range(start + 1, len(rest)) if rest[i].startswith("--")), len(rest))
    key, *values = rest[start + 1 : end] or [""]
    del rest[start:end]
    if len(values) < 2 or len(set(values)) < len(values):
        raise UserError(f"vary: needs a key and two or more different values, got {key} {values}")
    arguments = split_arguments(rest)
    if arguments.problems or len(arguments.positional) != 1:
        raise UserError("\n".join(arguments.problems) or f"one recipe is needed; usage: {USAGE}")
    seeds = dict(arguments.options).get("seeds", "3")
    if not str(seeds).isdecimal() or int(seeds) < 1:
        raise UserError(f"seeds: expected a whole number, 1 or more, got {seeds}")
    overrides = [f"--{name}={value}" for name, value in arguments.options if name != "seeds"]
    return arguments.positional[0], key, values, int(seeds), overrides


def compare(
    recipe: str, key: str, values: Sequence[str], seeds: int, overrides: Sequence[str]
) -> int:
    """Trains, scores and reports all runs; whole tables replace the last ones after every run.

    Raises UserError for recipes that cannot be run; all are read before the first one starts.
    """
    from rondo.pretrain.train import train

    if world_size() > 1:
        raise UserError(f"rondo compare trains on one process, not on {world_size()}")
    base = load_recipe(recipe, overrides)
    if not base.checkpoint.every:
        raise UserError("checkpoint.every: 0, but losses are compared at checkpoints")
    folder = Path(base.output_dir) / base.name
    numbers = range(base.seed, base.seed + seeds)
    runs = [
        (value, seed, variant(recipe, overrides, base, key, value, seed))
        for seed in numbers
        for value in values
    ]
    _check(key, [folder / run.name for _, _, run in runs], [run for _, _, run in runs])
    domains = open_domains(base)
    console = Console(stderr=True)
    scores: Scores = {}
    for number, (value, seed, run) in enumerate(runs, start=1):
        console.print(f"run {number}/{len(runs)}: {key} {value}, seed {seed}", highlight=False)
        path = folder / run.name / "domains.json"
        if not _scored(path, run):
            if code := train(run):
                return code
            score_run(path, run, domains)
        scores[value, seed] = _read(path)
        write_report(folder, f"{base.name}: {key}", values, numbers, scores)
    console.print(f"wrote {folder / 'compare.md'}, .json and .html", highlight=False)
    return 0


def _check(key: str, folders: Sequence[Path], runs: Sequence[Recipe]) -> None:
    if key in ("seed", "name", "output_dir", "checkpoint.keep") or len({*folders}) < len(folders):
        raise UserError(f"vary: values of {key} do not make runs with folders of their own")
    for folder, run in zip(folders, runs, strict=True):
        require_same_recipe(folder, run)


def variant(
    path: str, overrides: Sequence[str], base: Recipe, key: str, value: str, seed: int
) -> Recipe:
    """The recipe of one run: every checkpoint is kept, in a folder of its own."""
    word = re.sub(r"[^A-Za-z0-9._-]+", "-", value)
    own = [f"--{key}={value}", f"--seed={seed}", f"--name={word}-seed{seed}", "--checkpoint.keep=0"]
    recipe = load_recipe(path, [*overrides, *own], world_size=1)
    return dataclasses.replace(recipe, output_dir=str(Path(base.output_dir) / base.name))


def open_domains(recipe: Recipe) -> dict[str, TokenDataset]:
    """The held-out text of every source that has any. Raises DataError when none has."""
    every = all_sources(recipe)
    sources = prepare_sources(dataclasses.replace(recipe.data, sources=every))
    found: dict[str, TokenDataset] = {}
    for name, folder in zip(domain_names(every), sources.folders, strict=True):
        alone = Sources([folder], [1.0], sources.tokenizer)
        try:
            found[name] = TokenDataset(alone, recipe.data.sequence_length, 0, "validation")
        except DataError:
            if (folder / "validation.idx").is_file() and (folder / "validation.bin").stat().st_size:
                raise
    if not found:
        raise DataError("data.validation_fraction: no source holds out text to compare losses on")
    return found


@torch.no_grad()
def domain_loss(model: Decoder, dataset: TokenDataset, sequences: int) -> float:
    """Unweighted mean cross-entropy, nats a token, of the first `sequences` of `dataset`; each of
    its tokens counts once at most."""
    total = tokens = 0.0
    held = dataset.epochs(1)[0] or 1.0
    sequences = max(1, min(sequences, int(1 / held)))
    for start in range(0, sequences, _CHUNK):
        batch = dataset.batch(range(start, min(start + _CHUNK, sequences)))
        batch = batch.to(model.output_weight.device)
        total += model.loss(batch.tokens, batch.targets, segment_ids=batch.segment_ids).item()
        tokens += int((batch.targets >= 0).sum())
    return total / max(1.0, tokens)


def score_run(path: Path, run: Recipe, domains: dict[str, TokenDataset]) -> None:
    """Writes the losses (in float32, where training computes) of all checkpoints of a finished run
    by step and domain.

    Raises UserError when one of the checkpoints is missing: losses at equal steps need all.
    """
    sequences = run.data.global_batch_size * max(1, run.evals.batches)
    found: dict[str, dict[str, float]] = {}
    for step in _steps(run):
        checkpoint = step_folder(path.parent / "checkpoints", step)
        if not checkpoint.is_dir():
            raise UserError(f"{checkpoint}: missing, and losses are compared at it; delete the run")
        model = load(checkpoint, rank_device(), torch.float32).eval()
        found[str(step)] = {
            name: domain_loss(model, dataset, sequences) for name, dataset in domains.items()
        }
    beside = path.with_suffix(".part")
    beside.write_text(json.dumps(found, indent=1) + "\n")
    os.replace(beside, path)


def write_report(
    folder: Path, title: str, values: Sequence[str], seeds: Sequence[int], scores: Scores
) -> None:
    """compare.json, compare.md and compare.html of the runs so far."""
    data = results(title, values, seeds, scores)
    texts = {"json": json.dumps(data, indent=1) + "\n", "md": markdown(data), "html": page(data)}
    for suffix, text in texts.items():
        (folder / f"compare.{suffix}").write_text(text, "utf-8")


def _steps(run: Recipe) -> list[int]:
    """Steps of a run's checkpoints."""
    last = total_steps(run)
    return [*range(run.checkpoint.every, last, run.checkpoint.every), last]


def _scored(path: Path, run: Recipe) -> bool:
    return path.is_file() and [int(step) for step in json.loads(path.read_text())] == _steps(run)


def _read(path: Path) -> dict[int, dict[str, float]]:
    return {int(step): losses for step, losses in json.loads(path.read_text()).items()}
