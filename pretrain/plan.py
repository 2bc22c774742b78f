"""`rondo plan`: what a recipe would take on so many GPUs, found on one machine without any, and
what its learning rate would be."""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_type_hints

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from rondo.errors import UserError
from rondo.parallel.config import ParallelConfig
from rondo.parallel.mesh import Layout
from rondo.parallel.plan.estimate import EFFICIENCY, Plan, make_plan
from rondo.parallel.plan.hardware import Hardware, find_hardware
from rondo.parallel.plan.job import Job, Model
from rondo.parallel.plan.page import plan_page
from rondo.parallel.plan.report import plan_data, show_plan, show_search
from rondo.parallel.plan.search import search
from rondo.pretrain.data.tokenizer import ByteTokenizer
from rondo.pretrain.optim import build_optimizers
from rondo.pretrain.options import help_text, parse_dataclass, split_arguments
from rondo.pretrain.parse import load_recipe
from rondo.pretrain.recipe import Recipe
from rondo.pretrain.repeats_view import repeats_data, show_repeats
from rondo.pretrain.schedule_view import Curve, schedule_data, schedule_page, show_schedule
from rondo.pretrain.validate import problems

_USAGE = "rondo plan RECIPE --ranks N | --schedule [--option value]... [--section.key value]..."
_DESCRIPTION = """\
Lays RECIPE out on N ranks without GPUs: memory, collectives, predicted time. Keys of the recipe
(`rondo train --help` lists them) can be given here too, and then override the file."""
_ANY_LAYOUT = [f"--parallel.{name}=1" for name in (*Layout._fields, "ep")]


@dataclasses.dataclass
class PlanConfig:
    """What to plan for."""

    recipe: str
    """Recipe file, or the name of a bundled recipe."""
    ranks: int | None = None
    """GPUs; needed for everything but --schedule."""
    schedule: bool = False
    """Draw the learning rate over the run, instead of laying it out."""
    hardware: str = "H100"
    """A100, H100, H200 or MI300X."""
    node_size: int | None = None
    """GPUs in a node; None: 8."""
    nvlink_gbs: float | None = None
    """Bandwidth between GPUs of a node, GB/s in one direction; None: the data sheet's."""
    network_gbs: float | None = None
    """Bandwidth of a GPU to other nodes, GB/s in one direction; None: that of usual clusters."""
    efficiency: float = EFFICIENCY
    """Share of the peak FLOP/s that a GPU reaches while it computes (an assumption)."""
    search: bool = False
    """Look for the best layouts that fit, instead of the recipe's."""
    json: bool = False
    """Print JSON instead of tables."""
    html: str | None = None
    """File to write an HTML page to."""


def main(words: Sequence[str]) -> int:
    """Plans what a command line says. Returns the exit code."""
    words = _with_values(words)
    if split_arguments(words).wants_help:
        print(help_text(PlanConfig, _USAGE, _DESCRIPTION), end="")
        return 0
    own, overrides = _split(words)
    config = parse_dataclass(PlanConfig, own, "rondo plan", ("recipe",))
    _check(config)
    if config.schedule:
        draw_schedule(load_recipe(config.recipe, overrides, world_size=config.ranks), config)
        return 0
    hardware = find_hardware(
        config.hardware,
        node_size=config.node_size,
        nvlink_gbs=config.nvlink_gbs,
        network_gbs=config.network_gbs,
    )
    if config.search:  # the layout of the recipe does not matter when others are looked for
        overrides += _ANY_LAYOUT
    recipe = load_recipe(
        config.recipe, overrides, world_size=None if config.search else config.ranks
    )
    plan_recipe(recipe, config, hardware)
    return 0


def draw_schedule(recipe: Recipe, config: PlanConfig) -> None:
    """Prints and writes the learning rate of `recipe` in the forms that `config` asks for."""
    curve = Curve(recipe)
    console = _console()
    if config.json:
        print(json.dumps(schedule_data(curve), indent=2))
    else:
        show_schedule(curve, console)
    _write_page(schedule_page(curve), config, console)


def plan_recipe(recipe: Recipe, config: PlanConfig, hardware: Hardware) -> list[Plan]:
    """Makes, prints and writes the plans that `config` asks for; returns them, best first."""
    assert config.ranks is not None, "main has seen to it"
    job = make_job(recipe, config.ranks)
    if config.search:
        plans = _search(recipe, job, config, hardware)
        if not plans:
            raise UserError(
                f"no layout that was tried fits {config.ranks} x {hardware.name}; a smaller "
                "data.micro_batch_size, more ranks or another data.global_batch_size may help"
            )
    else:
        plans = [make_plan(job, hardware, config.efficiency)]
    console = _console()
    if config.json:
        repeats = {"data": repeats_data(recipe, job.model.parameters)}
        data = [plan_data(plan) | repeats for plan in plans]
        print(json.dumps(data if config.search else data[0], indent=2))
    else:
        show_plan(plans[0], console)
        show_repeats(recipe, job.model.parameters, console)
        if config.search:
            show_search(plans, console)
    _write_page(plan_page(plans[0], plans if config.search else ()), config, console)
    return plans


def _console() -> Console:
    return Console(width=None if Console().is_terminal else 120)


def _write_page(page: str, config: PlanConfig, console: Console) -> None:
    if config.html is not None:
        Path(config.html).write_text(page, "utf-8")
        if not config.json:
            console.print(f"wrote {config.html}")


def make_job(recipe: Recipe, ranks: int) -> Job:
    """What a recipe asks of `ranks` ranks."""
    vocab_size = recipe.model.vocab_size
    if not vocab_size and recipe.data.tokenizer != "bytes":
        raise UserError(
            "model.vocab_size: a plan needs the size of the vocabulary; give it here, as in "
            "--model.vocab_size 32000"
        )
    if recipe.parallel.engine != "native":
        raise UserError(
            f"parallel.engine: a plan knows what the native engine holds and sends, not "
            f"{recipe.parallel.engine}; plan with --parallel.engine native"
        )
    return Job(
        model=Model(
            dataclasses.replace(recipe.model, vocab_size=vocab_size or ByteTokenizer.vocab_size),
            recipe.data.sequence_length,
        ),
        parallel=recipe.parallel,
        ranks=ranks,
        global_batch=recipe.data.global_batch_size,
        micro_batch=recipe.data.micro_batch_size,
        precision=recipe.precision,
        make_optimizers=lambda parts: build_optimizers(parts, recipe.optimizer),
    )


def _search(recipe: Recipe, job: Job, config: PlanConfig, hardware: Hardware) -> list[Plan]:
    def possible(parallel: ParallelConfig) -> bool:
        return not problems(dataclasses.replace(recipe, parallel=parallel), config.ranks)

    columns = (TextColumn("looking at layouts"), BarColumn(), MofNCompleteColumn())
    console = Console(stderr=True)
    with Progress(
        *columns,
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as progress:
        task = progress.add_task("layouts", total=None)
        return search(
            job,
            hardware,
            efficiency=config.efficiency,
            possible=possible,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )


def _check(config: PlanConfig) -> None:
    if config.ranks is None and not config.schedule:
        raise UserError("ranks: required key, expected a whole number; or --schedule")
    if config.ranks is not None and config.ranks < 1:
        raise UserError(f"ranks: must be at least 1, got {config.ranks}")
    if not 0 < config.efficiency <= 1:
        raise UserError(f"efficiency: must be above 0 and at most 1, got {config.efficiency}")
    if config.html is not None and Path(config.html).is_dir():
        raise UserError(f"html: {config.html} is a folder, not a file to write")
    if config.html is not None and not Path(config.html).absolute().parent.is_dir():
        raise UserError(f"html: no folder for {config.html}")


def _with_values(words: Sequence[str]) -> list[str]:
    """`words` with a value for the switches that stand alone."""
    hints = get_type_hints(PlanConfig)
    switches = {f"--{name}" for name, kind in hints.items() if kind is bool}
    found: list[str] = []
    for i, word in enumerate(words):
        alone = i + 1 == len(words) or words[i + 1] not in ("true", "false")
        found.append(f"{word}=true" if word in switches and alone else word)
    return found


def _split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words that are for the plan, and those that override the recipe (sections have dots)."""
    arguments = split_arguments(words)
    if arguments.problems:
        raise UserError("\n".join(arguments.problems))
    top = {field.name for field in dataclasses.fields(Recipe)}
    names = [field.name for field in dataclasses.fields(PlanConfig)]
    own: list[str] = list(arguments.positional)
    overrides: list[str] = []
    for key, value in arguments.options:
        if key in names:
            own.append(f"--{key}={value}")
        elif "." in key or key in top:
            overrides.append(f"--{key}={value}")
        else:
            near: list[Any] = difflib.get_close_matches(key, names, n=1)
            hint = f"; did you mean --{near[0]}?" if near else ""
            raise UserError(f"{key}: unknown option{hint} (rondo plan --help lists them)")
    return own, overrides
