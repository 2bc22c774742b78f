"""What scoring checkpoints beside training costs it: a run with `evals.tasks` against one without.

    python -m rondo.pretrain.bench_evals quickstart --rounds 3 --evals.tasks '[bits_per_byte]'

Each round trains the recipe twice from its beginning, in a folder that is deleted, in changing
order. Two things are told apart: the time that the loop itself lost (`eval_seconds`: starting what
watches the run, saving checkpoints that only scoring needs, waiting), which is the same wherever
the jobs run, and the speed of the steps, which jobs on the same machine slow down.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

from rondo.errors import UserError, run_command
from rondo.pretrain.parse import load_recipe, split_arguments
from rondo.pretrain.recipe import Recipe
from rondo.pretrain.train import DONE, train

_WARM_UP = 3
"""Steps at the beginning of a run that are not counted."""


@dataclasses.dataclass(frozen=True)
class Run:
    """One run."""

    tokens_per_second: float
    """Of its steps alone."""
    step_seconds: float
    """Sum over all steps."""
    lost_seconds: float
    """By which steps were held up for the sake of scoring."""
    after_seconds: float
    """From the last step's line in metrics.jsonl to the end of the run."""


def contest(recipe: Recipe, rounds: int) -> dict[str, list[Run]]:
    """Runs by kind, `with` and `without` the recipe's `evals.tasks`, one of each a round.

    Raises:
        UserError: the recipe scores nothing, or a run was stopped.
    """
    if not recipe.evals.tasks:
        raise UserError("evals.tasks: nothing to measure; name tasks, as in '[bits_per_byte]'")
    plain = dataclasses.replace(recipe.evals, tasks=[])
    kinds = {"with": recipe, "without": dataclasses.replace(recipe, evals=plain)}
    found: dict[str, list[Run]] = {name: [] for name in kinds}
    for number in range(rounds):
        for name in sorted(kinds, reverse=number % 2 == 0):
            found[name].append(_run(kinds[name]))
            print(f"{name}: {found[name][-1]}", file=sys.stderr, flush=True)
    return found


def _run(recipe: Recipe) -> Run:
    with tempfile.TemporaryDirectory() as folder:
        recipe = dataclasses.replace(recipe, output_dir=folder)
        if train(recipe) != DONE:
            raise UserError("a signal stopped the run")
        file = Path(folder) / recipe.name / "metrics.jsonl"
        after = time.time() - file.stat().st_mtime
        rows = [json.loads(line) for line in file.read_text().splitlines()]
    steps = [row["seconds"] for row in rows]
    counted = steps[_WARM_UP:] or steps
    tokens = recipe.data.global_batch_size * recipe.data.sequence_length * len(counted)
    lost = sum(row.get("eval_seconds", 0.0) for row in rows)
    return Run(tokens / sum(counted), sum(steps), lost, after)


def summary(found: dict[str, list[Run]]) -> dict[str, float]:
    """Of runs by kind: medians of tokens a second; the median over rounds of the speed with scoring
    over that without; the largest share of a run's time that its loop lost."""
    scored, plain = found["with"], found["without"]
    speeds = [
        (a.tokens_per_second, b.tokens_per_second) for a, b in zip(scored, plain, strict=True)
    ]
    return {
        "rounds": len(speeds),
        "tokens_per_second_with": statistics.median(a for a, _ in speeds),
        "tokens_per_second_without": statistics.median(b for _, b in speeds),
        "speed_ratio": statistics.median(a / b for a, b in speeds),
        "lost_seconds": max(run.lost_seconds for run in scored),
        "lost_share": max(
            run.lost_seconds / (run.step_seconds + run.lost_seconds) for run in scored
        ),
        "seconds_after_the_last_step": statistics.median(run.after_seconds for run in scored),
    }


def main() -> int:
    """Runs the contest that the command line names."""
    arguments = split_arguments(sys.argv[1:])
    options = dict(arguments.options)
    rounds = int(options.pop("rounds", "3"))
    [name] = arguments.positional or ["quickstart"]
    words = [f"--{key}={value}" for key, value in options.items()]
    for key, value in summary(contest(load_recipe(name, words), rounds)).items():
        print(f"{key} {value:.6g}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
