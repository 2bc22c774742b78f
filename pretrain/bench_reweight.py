"""What sample reweighting costs, on this machine: steps with and without it, in turns.

    torchrun --standalone --nproc-per-node 2 -m rondo.pretrain.bench_reweight quickstart \\
        [--rounds 30] [--section.key value]...

Every round runs one global batch twice, as an unweighted and as a weighted training step (metrics
and update included), and then the next the other way round. Strategy, unit and scope are the
recipe's; LinUpper where it says uniform. Weights act from the first step, whatever
`reweight.warmup_steps`. Times are rank 0's.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

from rondo.errors import run_command
from rondo.parallel.hardware import reuse_memory
from rondo.parallel.mesh import process_group, world_size
from rondo.parallel.signals import StopFlag
from rondo.pretrain.batches import micro_batch
from rondo.pretrain.data import rank_indices
from rondo.pretrain.options import split_arguments
from rondo.pretrain.parse import load_recipe
from rondo.pretrain.recipe import Recipe
from rondo.pretrain.reweight import Reweighting
from rondo.pretrain.run_data import open_data
from rondo.pretrain.train import Trainer


def contest(recipe: Recipe, rounds: int) -> None:
    """Prints one JSON object: median and best seconds of either step, and what weights add."""
    recipe = weighted(recipe)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        training, _ = open_data(recipe, folder)
        with process_group(recipe.parallel) as ranks, StopFlag([]) as stop:
            trainer = Trainer(recipe, folder, ranks, stop, training, {})
            seconds = _race(trainer, rounds)
            if ranks.rank == 0:
                print(json.dumps(summary(seconds)), flush=True)


def weighted(recipe: Recipe) -> Recipe:
    """`recipe` with samples that are weighted in every step: a warm-up may be a time without."""
    strategy = recipe.reweight.strategy
    reweight = dataclasses.replace(
        recipe.reweight,
        strategy="linupper" if strategy == "uniform" else strategy,
        warmup_steps=0,
    )
    return dataclasses.replace(recipe, reweight=reweight)


def _race(trainer: Trainer, rounds: int) -> dict[str, list[float]]:
    """Seconds by kind and round, but for the first two."""
    recipe, ranks = trainer.recipe, trainer.ranks
    plain = dataclasses.replace(recipe.reweight, strategy="uniform")
    kinds = {
        "plain": Reweighting(dataclasses.replace(recipe, reweight=plain), ranks),
        "weighted": trainer.reweighting,
    }
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    for number in range(rounds + 2):
        data = recipe.data
        indices = rank_indices(
            number,
            data.global_batch_size,
            ranks.data_index,
            ranks.layout.data_size,
            data.micro_batch_size,
        )
        batches = [micro_batch(trainer.training.batch(chunk), ranks) for chunk in indices]
        for name in sorted(kinds, reverse=bool(number % 2)):
            trainer.reweighting = kinds[name]
            ranks.sum(0.0)  # start together
            began = time.perf_counter()
            trainer.step(number, batches)
            if number >= 2:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def summary(seconds: dict[str, list[float]]) -> dict[str, float]:
    """Of seconds by kind and round: medians, bests, and the median over rounds of what the weighted
    step took more, as a share of the plain one."""
    plain, weighted = seconds["plain"], seconds["weighted"]
    extra = [b / a - 1 for a, b in zip(plain, weighted, strict=True)]
    return {
        "rounds": len(extra),
        "plain_seconds": statistics.median(plain),
        "weighted_seconds": statistics.median(weighted),
        "plain_best": min(plain),
        "weighted_best": min(weighted),
        "extra_time": statistics.median(extra),
        "extra_time_of_bests": min(weighted) / min(plain) - 1,
    }


def main() -> int:
    """Runs the contest that the command line names."""
    reuse_memory()
    arguments = split_arguments(sys.argv[1:])
    options = dict(arguments.options)
    rounds = int(options.pop("rounds", "30"))
    words = [f"--{key}={value}" for key, value in options.items()]
    [name] = arguments.positional or ["quickstart"]
    contest(load_recipe(name, words, world_size=world_size()), rounds)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
