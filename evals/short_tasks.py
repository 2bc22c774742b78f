"""`python -m rondo.evals.short_tasks`: which layers learn to recall, and to track a state.

Every cell of the table is a small model that is trained to give the answer beside each word of
short texts of the train split (`labelling.py`) and scored on the test split, on longer texts too.
What was scored is kept, so that the command can be stopped and started again, and cells be added:
a cell's file has `accuracy` by size, which the table shows, and beside it the share of right
answers among the `last` ones of the texts and among `all`, of which `accuracy` is one.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import Progress

from rondo.errors import UserError, run_command
from rondo.evals.labelling import Fit, Rows, fit, rows, score, vocabulary
from rondo.models import Decoder, ModelConfig
from rondo.pretrain.options import parse_command
from rondo.pretrain.parse import load_recipe

USAGE = "python -m rondo.evals.short_tasks [--option value]..."
TEXTS = 20_000
"""Texts to draw from in training."""


class Task(NamedTuple):
    """What is trained on, and what is scored."""

    sizes: tuple[int, ...]
    """Sizes of the texts to train on."""
    scored: tuple[int, ...]
    """Sizes of the texts that are scored."""
    classes: int | None
    """Answers that there are; None: as many as the size."""
    plan: Fit
    before: tuple[str, ...] = ()
    """Layers in front of the row's own."""
    last: bool = True
    """Score the last answer of each text only."""
    kind: str | None = None
    """What its texts are, a key of `evals.tasks.LABELLED`; None: what the task is called."""


def _tracking(
    size: int, longer: tuple[int, ...], classes: int, steps: int, kind: str | None = None
) -> Task:
    """A task of which short texts are learnt first."""
    plan = Fit(steps, lr=1e-2, first=3)
    return Task((size,), (size, *longer), classes, plan, kind=kind)


def _product(size: int, longer: tuple[int, ...], classes: int, steps: int) -> Task:
    """A task whose longer texts are no use before the short ones are learnt."""
    plan = Fit(steps, words=1024, lr=1e-2, first=3, grow_below=0.2)
    return Task((size,), (size, *longer), classes, plan)


TASKS = {
    # A layer that sees the token before: without it, layers must first find out what pairs are.
    "mqar_all": Task((4, 8), (8, 16), None, Fit(800), ("previous+none",), last=False),
    # More pairs than a small state has room for, in training too.
    "mqar_many": Task(
        (8, 32), (8, 16, 32, 48), None, Fit(800), ("previous+none",), last=False, kind="mqar_all"
    ),
    # Zoology's texts, of 512 words. With 8 pairs among them more positions ask.
    "mqar_small_64_4": Task(
        (4, 8), (4,), None, Fit(2000), ("previous+none",), last=False, kind="mqar_small_64"
    ),
    "mqar_small_64_16": Task(
        (8, 16), (16,), None, Fit(2000), ("previous+none",), last=False, kind="mqar_small_64"
    ),
    "mqar_small_128_8": Task(
        (4, 8), (8,), None, Fit(2000), ("previous+none",), last=False, kind="mqar_small_128"
    ),
    # One question, after one reading of the pairs or after two.
    "recall_once": Task((4, 8), (8,), None, Fit(600), ("previous+none",)),
    "recall_twice": Task((4, 8), (8,), None, Fit(600), ("previous+none",)),
    "parity": _tracking(16, (64,), 2, 500),
    "cycle_navigation": _tracking(32, (100,), 5, 600),
    # Trained on the length that is scored, in many small steps.
    "cycle_navigation_100": Task(
        (100,),
        (100,),
        5,
        Fit(2000, 32, 2048, 1e-2, first=3, grow_below=0.1),
        kind="cycle_navigation",
    ),
    # In fewer and larger steps: what is learnt soon.
    "cycle_navigation_100_brief": Task(
        (100,), (100,), 5, Fit(600, 64, 2048, 1e-2, first=3), kind="cycle_navigation"
    ),
    # As ParaRNN trains on such tasks: a few whole texts a step, at a low rate.
    "cycle_navigation_100_whole": Task(
        (100,), (100,), 5, Fit(6000, 16, lr=5e-4), kind="cycle_navigation"
    ),
    # For rows of a mixer alone, as `mamba2+none`: no SwiGLU after it that could read a sum of moves
    # modulo 5, so that what counts is the state of the layer.
    "cycle_navigation_100_alone": Task(
        (100,), (100,), 5, Fit(1200, 16, 1600, 1e-2, 0.125, 3), last=False, kind="cycle_navigation"
    ),
    # From 3 bits to 40, scored on six times as many.
    "parity_40": _tracking(40, (128, 256), 2, 500, "parity"),
    "modular_arithmetic": _product(10, (40,), 5, 1500),
    "s3": _tracking(16, (64,), 6, 600),
    "s3_two_steps": _tracking(16, (64,), 6, 1200),
    "a5_generators": _product(16, (64,), 60, 1000),
    "s5_generators": _product(16, (64,), 120, 1000),
    "a5": _product(16, (64,), 60, 2500),
    "s5": _product(16, (64,), 120, 2500),
}
DELTA_RULES = ("gated_deltanet", "reflecting", "deltanet", "deltanet_reflecting")
DELTA_RULE_PLAN: dict[str, Any] = {"lr": 3e-3, "init_std": 0.02, "first": None}
"""What delta rules track a state with: larger weights at first, or a higher rate, fail in some
seeds, where the other rows need both."""
MAMBA2_RECALL_PLAN: dict[str, Any] = {"lr": 1e-2, "steps": 2000}
"""What Mamba-2 learns to recall with: at the other rows' 3e-3 it has not begun after 800 steps."""
Found = dict[str, dict[str, list[dict[int, float]]]]
"""Accuracy by mixer, task, seed and size."""


@dataclass
class ShortTasksConfig:
    """Which cells of the table are made, and where."""

    mixers: str = (
        "attention,matching,mamba2,gated_deltanet,reflecting,para_gru,para_lstm,lstm,slstm"
    )
    """Rows: mixers of the recipe `short-tasks`, with commas between them; slashes between those of
    layers, `mamba2+none` for one without the SwiGLU. `matching` is attention without positions,
    `reflecting` Gated DeltaNet with eigenvalues down to -1, `deltanet_reflecting` so DeltaNet,
    `narrow` Gated DeltaNet with a state of 16 keys, `wide_para_gru` and `wide_para_lstm` have twice
    the channels and a long memory at the start."""
    tasks: str = "mqar_all,parity"
    """Columns: mqar_all, mqar_many (up to 48 pairs), mqar_small_64_4 (4 pairs in 64 words),
    mqar_small_64_16, mqar_small_128_8, recall_once and recall_twice (one question after pairs that
    are read once or twice), parity, parity_40 (trained on 3 to 40 bits), cycle_navigation,
    cycle_navigation_100 (trained on 100 moves; with _brief in 600 steps, with _whole in 6,000 on
    16 texts at full length, with _alone all answers of a mixer alone), modular_arithmetic, s3,
    s3_two_steps (two words for each), a5, s5, a5_generators and s5_generators (words of two
    permutations that make all others)."""
    seeds: int = 3
    """Runs of each; the table has their mean, and the worst and the best."""
    samples: int = 500
    """Texts that are scored, of each size."""
    output: str = "runs/short-tasks"
    """Folder of results."""
    steps: int | None = None
    """Steps of a run; None: the task's."""
    lr: float | None = None
    """Peak learning rate; None: the task's."""


def table(config: ShortTasksConfig) -> Path:
    """Trains, scores and writes `table.md` beside the results; the path of it.

    Raises:
        UserError: a mixer or a task is not known, or a result was made with other options.
    """
    folder = Path(config.output)
    mixers, tasks = config.mixers.split(","), config.tasks.split(",")
    if unknown := [name for name in tasks if name not in TASKS]:
        raise UserError(f"tasks: unknown {unknown[0]!r} (known: {', '.join(TASKS)})")
    folder.mkdir(parents=True, exist_ok=True)
    found: Found = {mixer: {} for mixer in mixers}
    console = Console(stderr=True)
    for name, seed, mixer in itertools.product(tasks, range(config.seeds), mixers):
        scores = _cell(config, name, mixer, seed, folder, console)
        found[mixer].setdefault(name, []).append(scores)
        (folder / "table.md").write_text(markdown(found, tasks, config.seeds))
    return folder / "table.md"


def _cell(
    config: ShortTasksConfig, name: str, mixer: str, seed: int, folder: Path, console: Console
) -> dict[int, float]:
    """Accuracy by size, made now or before."""
    task, path = TASKS[name], folder / f"{name}-{mixer.replace('/', '-')}-{seed}.json"
    plan, kind = _plan(config, task, mixer), task.kind or name
    model = _model(task, mixer, len(vocabulary(kind)), plan.init_std)
    options: dict[str, Any] = {
        "model": _about(model),
        "plan": dataclasses.asdict(plan),
        "sizes": list(task.sizes),
        "samples": config.samples,
    }
    if path.is_file():
        kept = json.loads(path.read_text())
        if changed := [key for key, value in options.items() if kept[key] != value]:
            raise UserError(f"{path}: made with another {changed[0]}; take it away, or set output")
        return {int(size): value for size, value in kept["accuracy"].items()}
    began = time.process_time()
    pools = [rows(kind, size, "train", TEXTS, seed) for size in task.sizes]
    trained = _train(pools, model, plan, seed, path.stem, console)
    tests = {size: rows(kind, size, "test", config.samples, 0) for size in task.scored}
    scores = {size: score(trained, texts) for size, texts in tests.items()}
    accuracy = {size: each.last if task.last else each.mean for size, each in scores.items()}
    seconds = time.process_time() - began
    shown = ", ".join(
        f"{size}: last {each.last:.3f}, all {each.mean:.3f}" for size, each in scores.items()
    )
    console.print(f"{path.stem}: {shown} ({seconds:.0f} s)", highlight=False)
    both = {
        "last": {size: each.last for size, each in scores.items()},
        "all": {size: each.mean for size, each in scores.items()},
    }
    path.write_text(json.dumps({**options, "accuracy": accuracy, **both, "seconds": seconds}))
    return accuracy


def _train(
    pools: list[Rows], model: ModelConfig, plan: Fit, seed: int, title: str, console: Console
) -> Decoder:
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task(title, total=plan.steps)

        def say(step: int, loss: float) -> None:
            progress.update(bar, completed=step + 1, description=f"{title} loss {loss:.3f}")

        return fit(model, pools, plan, seed, say)


def _plan(config: ShortTasksConfig, task: Task, mixer: str) -> Fit:
    """The task's, or that of the row's last mixer, with what was asked for."""
    own: dict[str, Any] = {}
    tracks = task.classes is not None  # recall has as many answers as pairs
    top = mixer.split("/")[-1].split("+")[0]
    if tracks and top in DELTA_RULES:
        own = DELTA_RULE_PLAN
    elif not tracks and not task.last and top == "mamba2":
        own = MAMBA2_RECALL_PLAN
    given = {key: getattr(config, key) for key in ("steps", "lr")}
    asked = {key: value for key, value in given.items() if value is not None}
    return dataclasses.replace(task.plan, **{**own, **asked})


def _model(task: Task, mixer: str, words: int, std: float) -> ModelConfig:
    """That of the recipe, with the row's layers and a row of the embedding for each word."""
    pattern = [*task.before, *mixer.split("/")]
    shown = f"[{', '.join(pattern)}]"
    given = [f"--model.pattern={shown}", f"--model.num_layers={len(pattern)}"]
    return dataclasses.replace(
        load_recipe("short-tasks", given).model, vocab_size=words, init_std=std
    )


def _about(model: ModelConfig) -> dict[str, Any]:
    """What tells one model from another: not the mixers that it does not use."""
    layers = [dataclasses.asdict(layer) for layer in model.layers()]
    sizes = {key: getattr(model, key) for key in ("vocab_size", "dim", "ffn_dim", "init_std")}
    return {**sizes, "layers": layers}


def markdown(found: Found, tasks: list[str], seeds: int) -> str:
    """The table: means over seeds, the worst and the best where they differ; `[1 of 3]` where not
    all seeds are done."""
    heads = [f"{task} {size}" for task in tasks for size in TASKS[task].scored]
    lines = [["mixer", *heads], ["---"] * (len(heads) + 1)]
    guesses = [1 / (TASKS[t].classes or size) for t in tasks for size in TASKS[t].scored]
    lines.append(["guess", *(f"{guess:.2f}" for guess in guesses)])
    for mixer, row in found.items():
        cells = [
            _shown([scores[size] for scores in row.get(task, [])], seeds)
            for task in tasks
            for size in TASKS[task].scored
        ]
        lines.append([mixer, *cells])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _shown(values: list[float], seeds: int) -> str:
    if not values:
        return ""
    mean, low, high = sum(values) / len(values), min(values), max(values)
    text = f"{mean:.2f}" if high - low < 0.01 else f"{mean:.2f} ({low:.2f} to {high:.2f})"
    return text if len(values) == seeds else f"{text} [{len(values)} of {seeds}]"


def main(words: list[str]) -> int:
    """Runs the command; see `ShortTasksConfig`."""
    config = parse_command(ShortTasksConfig, words, USAGE, ())
    if config is not None:
        print(table(config).read_text(), end="")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(sys.argv[1:])))
