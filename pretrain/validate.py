"""What a well-typed recipe can still get wrong: impossible numbers, layouts and names."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import os
import re
import signal
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from rondo.models import config as model_config
from rondo.pretrain.data.errors import DataError
from rondo.pretrain.data.train_tokenizer import parse_pieces
from rondo.pretrain.plain import show
from rondo.pretrain.recipe import Recipe
from rondo.pretrain.typed import RecipeError
from rondo.pretrain.validate_engine import engine_problems
from rondo.pretrain.validate_layout import layout_problems, model_layout_problems
from rondo.pretrain.validate_schedule import LARGEST, schedule_problems
from rondo.pretrain.validate_stages import source_problems, stage_problems

_AT_LEAST = {
    "steps": 1,
    "seed": 0,
    "data.sequence_length": 1,
    "data.global_batch_size": 1,
    "data.micro_batch_size": 1,
    "optimizer.max_skipped_steps": 0,
    "checkpoint.every": 0,
    "checkpoint.keep": 0,
    "evals.every": 0,
    "evals.batches": 0,
    "evals.limit": 0,
    "evals.batch_size": 0,
    "evals.samples": 0,
    "evals.seed": 0,
    "evals.retries": 0,
    "evals.slurm.gpus": 0,
    "evals.slurm.cpus": 0,
    "logging.every": 1,
    "logging.norms_every": 0,
}
_ABOVE_0 = (
    "optimizer.lr",
    "optimizer.eps",
    "reweight.temperature",
    "reweight.start_temperature",
)
_NOT_BELOW_0 = ("data.max_epochs", "optimizer.weight_decay", "optimizer.clip_norm")
_NOT_EMPTY = ("output_dir", "data.folder", "data.tokenizer", "checkpoint.resume")
_LONGEST_NAME = 128
_TIME = r"\d+(:\d+(:\d+)?)?|\d+-\d+(:\d+(:\d+)?)?"


def validate(recipe: Recipe, world_size: int | None = None) -> None:
    """Raises RecipeError with all `problems` of a recipe, if it has any."""
    if found := problems(recipe, world_size):
        raise RecipeError(found, f"recipe {show(recipe.name)}")


def problems(
    recipe: Recipe, world_size: int | None = None, *, unread: Collection[str] = ()
) -> list[str]:
    """Everything that makes `recipe` impossible on `world_size` ranks; each starts with its key.

    Without `world_size` the layout is checked as far as it can be. `unread` are keys that could
    not be read and stand at their defaults: they and their relation to others are not checked.
    """

    def all_read(*prefixes: str) -> bool:
        return not any(key.startswith(prefixes) for key in unread)

    found = [*_numbers(recipe), *_names(recipe), *_paths(recipe)]
    found += [*_sources(recipe), *_evals(recipe)]
    sizes = ("data.global_batch_size", "data.micro_batch_size", "data.sequence_length")
    if all_read("steps", "schedule.", "reweight.warmup_steps", *sizes):
        wrong = schedule_problems(recipe, fit=not recipe.stages)
        found += wrong
        if not wrong and recipe.steps >= 1 and all_read("stages"):
            found += stage_problems(recipe)
    if all_read("parallel.", *sizes):
        found += layout_problems(recipe, world_size)
        found += engine_problems(recipe, world_size)
    if all_read("model."):
        found += (wrong := model_config.problems(recipe.model))
        if not wrong and all_read("parallel.", "compile"):
            found += model_layout_problems(recipe)
    return [problem for problem in found if problem.partition(":")[0] not in unread]


def _numbers(recipe: Recipe) -> Iterator[str]:
    for key, least in _AT_LEAST.items():
        value = _get(recipe, key)
        if not least <= value <= LARGEST:
            yield f"{key}: must be at least {least} and at most {LARGEST}, got {show(value)}"
    for key in _ABOVE_0:
        if not 0 < _get(recipe, key) < math.inf:
            yield f"{key}: must be a finite number above 0, got {show(_get(recipe, key))}"
    for key in _NOT_BELOW_0:
        if not 0 <= _get(recipe, key) < math.inf:
            yield f"{key}: must be a finite number, 0 or more, got {show(_get(recipe, key))}"
    for i, beta in enumerate(recipe.optimizer.betas):
        if not 0 <= beta < 1:
            yield f"optimizer.betas.{i}: must be at least 0 and below 1, got {show(beta)}"
    if not 0 <= recipe.reweight.clip_quantile < 0.5:
        quantile = show(recipe.reweight.clip_quantile)
        yield f"reweight.clip_quantile: must be at least 0 and below 0.5, got {quantile}"
    if not 0 <= recipe.data.validation_fraction < 1:
        fraction = show(recipe.data.validation_fraction)
        yield f"data.validation_fraction: must be at least 0 and below 1, got {fraction}"


def _names(recipe: Recipe) -> Iterator[str]:
    for key, text in _texts(dataclasses.asdict(recipe)):
        if not text.isprintable():
            yield f"{key}: must not hold control characters, got {show(text)}"
        elif "${" in text:
            yield f"{key}: ${{...}} is not expanded in recipes; write the value, got {show(text)}"
    for key in _NOT_EMPTY:
        if not _get(recipe, key):
            yield f"{key}: must not be empty"
    name = recipe.name
    if not 1 <= len(name) <= _LONGEST_NAME or name.strip(". ") == "" or set(name) & set("/\\"):
        yield (
            f"name: must be the name of a folder, 1 to {_LONGEST_NAME} characters without / or "
            f"\\, got {show(name)}"
        )
    resume = recipe.checkpoint.resume
    near = difflib.get_close_matches(resume, ["auto", "never"], n=1)
    if near and resume not in near and not os.path.exists(resume):
        yield (
            "checkpoint.resume: expected auto, never or the path of a checkpoint, "
            f"got {show(resume)}; did you mean {near[0]}?"
        )
    if recipe.checkpoint.init_from is not None and resume not in ("auto", "never"):
        yield (
            f"checkpoint.init_from: a run begins either with parameters or with all of a "
            f"checkpoint, and checkpoint.resume is {show(resume)}"
        )
    signals = {s.name for s in signal.Signals} - {"SIGKILL", "SIGSTOP"}  # these cannot be caught
    if recipe.checkpoint.signal not in signals:
        near = difflib.get_close_matches(recipe.checkpoint.signal, sorted(signals), n=1)
        yield (
            "checkpoint.signal: expected the name of a signal that can be caught, "
            f"got {show(recipe.checkpoint.signal)}; did you mean {[*near, 'SIGUSR1'][0]}?"
        )


def _paths(recipe: Recipe) -> Iterator[str]:
    """What can be said of paths without reading anything."""
    try:
        parse_pieces(recipe.data.tokenizer)
    except DataError as error:
        yield f"data.tokenizer: {error}"
    data = os.path.expanduser(recipe.data.folder)
    for key, place in (("output_dir", Path(recipe.output_dir)), ("data.folder", Path(data))):
        taken = [path for path in (place, *place.parents) if os.path.isfile(path)]
        if taken:
            yield f"{key}: must be a folder, but {show(str(taken[0]))} is a file"
    run = os.path.join(recipe.output_dir, recipe.name)
    if os.path.isfile(run):
        yield f"name: must be the name of a folder, but {show(run)} is a file"


def _sources(recipe: Recipe) -> Iterator[str]:
    if not recipe.data.sources:
        yield "data.sources: needs at least one source, as [{path: stdlib-english}], got []"
    yield from source_problems("data.sources", recipe.data.sources)


def _evals(recipe: Recipe) -> Iterator[str]:
    config = recipe.evals
    for i, task in enumerate(config.tasks):
        if not task or set(task) & set(", /\\") or task.startswith(("-", ".")):
            yield f"evals.tasks.{i}: must be the name of a task of `rondo eval`, got {show(task)}"
        elif task in config.tasks[:i]:
            yield f"evals.tasks.{i}: {show(task)} is there already"
    for name in ("data_dir", "text"):
        if getattr(config, name) == "":
            yield f"evals.{name}: must not be empty"
    for name in ("container", "python"):
        if getattr(config.slurm, name) == "":
            yield f"evals.slurm.{name}: must not be empty"
    limit = config.slurm.time
    if limit is not None and not re.fullmatch(_TIME, limit):
        yield (
            f"evals.slurm.time: expected minutes, MM:SS, HH:MM:SS or D-HH:MM:SS, got {show(limit)}"
        )


def _texts(plain: Any, key: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(plain, str):
        yield key, plain
    elif isinstance(plain, dict):
        for name, value in plain.items():
            yield from _texts(value, f"{key}.{name}" if key else name)
    elif isinstance(plain, list | tuple):
        for i, value in enumerate(plain):
            yield from _texts(value, f"{key}.{i}")


def _get(recipe: Recipe, key: str) -> Any:
    return functools.reduce(getattr, key.split("."), recipe)
