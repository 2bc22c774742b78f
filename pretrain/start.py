"""Where a run begins: its own newest checkpoint, that of another run, or another's parameters; and
what changes where a stage begins."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from rondo.errors import UserError
from rondo.models import Decoder, ModelConfig
from rondo.models.config import make_options
from rondo.models.loading import find_checkpoint
from rondo.parallel.checkpoint import STATE, Changes, Checkpointer
from rondo.parallel.engines import NativeEngine
from rondo.pretrain.data import Tokenizer, load_tokenizer
from rondo.pretrain.recipe import Recipe
from rondo.pretrain.stages import Stage, stages_of, total_steps


class Origin(NamedTuple):
    """What a run begins with while its folder has no checkpoint of its own."""

    path: Path
    whole: bool
    """It goes on there; else it takes the parameters."""
    optimizer: bool = False
    """And the state of the optimizer."""


def find_origin(recipe: Recipe) -> Origin | None:
    """Of `checkpoint.resume`, `checkpoint.init_from` or the first stage's. Raises UserError where
    nothing is there, or where a later stage is to begin."""
    config, (first, *later) = recipe.checkpoint, stages_of(recipe)
    for stage in later:
        if stage.init_from is not None:
            _find(f"stages.{stage.number}.init_from", stage.init_from)
    if config.resume not in ("auto", "never"):
        return Origin(_find("checkpoint.resume", config.resume), True)
    if config.init_from is not None:
        return Origin(_find("checkpoint.init_from", config.init_from), False)
    if first.init_from is not None:
        path = _find("stages.0.init_from", first.init_from)
        return Origin(path, False, not first.reset_optimizer)
    return None


def _find(key: str, path: str) -> Path:
    """The checkpoint at `path`, which the recipe gives as `key`."""
    try:
        return find_checkpoint(Path(path))
    except UserError as error:
        raise UserError(f"{key}: {error}") from error


def saved_streams(folder: Path, origin: Origin | None) -> dict[int, list[Any]]:
    """What was read of each streamed source, by number, in the run of `folder`, else in the one
    that it goes on with: what `open_rows` is to open again."""
    checkpoints = sorted((folder / "checkpoints").glob("step-*/manifest.json"), reverse=True)
    paths = [manifest.parent for manifest in checkpoints]
    if not paths and origin is not None and origin.whole:
        paths = [origin.path]
    for path in paths:
        try:
            streams = json.loads((path / STATE).read_text()).get("streams", {})
            return {int(n): state["source"] for n, state in streams.items() if "source" in state}
        except (OSError, ValueError):  # damaged: `Checkpointer` will say so and take the next
            continue
    return {}


def begin(
    checkpointer: Checkpointer,
    engine: NativeEngine,
    recipe: Recipe,
    tokenizer: Tokenizer,
    state: dict[str, Any],
    origin: Origin | None,
    fingerprint: Callable[[int], str],
) -> tuple[dict[str, Any], list[str]]:
    """Fills parameters and optimizers from the run's own newest checkpoint, else from `origin`.

    The run's own checkpoint must be of the same model to the last tensor. That of another run may
    differ in what is trained and in optional buffers (`Checkpointer.changes`).

    Args:
        state: that of a new run.
        fingerprint: of the data before a step.

    Returns:
        The state to go on from, and what to say of it.

    Raises:
        UserError: the checkpoint does not fit the recipe.
    """
    own = checkpointer.newest()
    if own is not None:
        origin = Origin(own, True)
    if origin is None:
        return state, []
    at = origin.path
    path = checkpointer.found(lambda: at)
    if not origin.whole:
        lines = take(checkpointer, engine, tokenizer, path, optimizer=origin.optimizer)
        return state, lines
    tensors = engine.tensors()
    changes = Changes({}, {})
    if own is None:
        changes = checkpointer.changes(path, tensors, _optional_names(engine.config))
    saved = checkpointer.load(path, changes.stored(tensors), dropped=changes.dropped)
    _check_state(saved, fingerprint, recipe, path)
    engine.take_in(tensors)
    lines = [f"going on after step {saved['step']}, from {path}", str(changes)]
    return saved, [line for line in (*lines, *model_differences(path, engine.config)) if line]


def take(
    checkpointer: Checkpointer,
    engine: NativeEngine,
    tokenizer: Tokenizer,
    path: Path,
    *,
    optimizer: bool,
) -> list[str]:
    """Fills parameters, and the optimizers' state if `optimizer`, from a checkpoint of another run;
    returns what to say of it. Raises UserError where it does not fit."""
    check_tokenizer(tokenizer, path)
    tensors, config = engine.tensors(), engine.config
    changes = checkpointer.changes(path, tensors, _optional_names(config))
    stored = changes.stored(tensors)
    chosen = ("model", "optimizer") if optimizer else ("model",)
    checkpointer.load(
        path,
        {part: stored[part] for part in chosen},
        dropped={part: changes.dropped[part] for part in chosen},
    )
    engine.take_in({part: tensors[part] for part in chosen})
    what = "parameters and optimizer" if optimizer else "parameters"
    return [f"beginning with the {what} of {path}", *model_differences(path, config)]


def enter(
    stage: Stage,
    checkpointer: Checkpointer,
    engine: NativeEngine,
    tokenizer: Tokenizer,
) -> list[str]:
    """What changes before the first step of a stage that is not the run's first; returns what to
    say of it. Raises UserError where `init_from` does not fit."""
    lines = [f"stage {stage.name}: {stage.steps:,} steps from step {stage.start + 1:,} on"]
    if stage.reset_optimizer:
        reset(engine)
    if stage.init_from is not None:
        there, keep = Path(stage.init_from), not stage.reset_optimizer
        path = checkpointer.found(lambda: find_checkpoint(there))
        lines += take(checkpointer, engine, tokenizer, path, optimizer=keep)
    return lines


@torch.no_grad()
def reset(engine: NativeEngine) -> None:
    """Brings optimizers back to where they were before their first step: no moments, step 0."""
    tensors = engine.optimizer_tensors()
    for tensor in tensors.values():
        tensor.zero_()
    engine.take_in({"optimizer": tensors})


def _check_state(
    saved: Mapping[str, Any], fingerprint: Callable[[int], str], recipe: Recipe, path: Path
) -> None:
    if saved["data"] != fingerprint(saved["step"]):
        stages = "stages, replay, " if recipe.stages else ""
        raise UserError(
            f"data: {path} was trained on other data ({stages}sources, weights, tokenizer, "
            "sequence_length or seed differ), so its place in the data is lost; "
            "checkpoint.init_from takes its parameters alone"
        )
    steps = total_steps(recipe)
    if saved["step"] > steps:
        raise UserError(f"steps: {steps}, but {path} is after step {saved['step']}")


def check_tokenizer(tokenizer: Tokenizer, path: Path) -> None:
    """Raises UserError where the tokenizer of a checkpoint is another."""
    there = load_tokenizer(path / "tokenizer")
    if there.fingerprint() != tokenizer.fingerprint():
        raise UserError(
            f"checkpoint.init_from: {path} has another tokenizer ({there.kind}, "
            f"{there.vocab_size:,} tokens) than data.tokenizer ({tokenizer.kind}, "
            f"{tokenizer.vocab_size:,}), so its embedding means other tokens"
        )


def model_differences(checkpoint: Path, config: ModelConfig) -> list[str]:
    """What differs between the model of a checkpoint and `config`, of the same tensors: another
    window, another chunk of a memory or another base of rotations make another model."""
    stored = ModelConfig(**json.loads((checkpoint / "model" / "config.json").read_text()))
    there, here = _facts(stored), _facts(config)
    found = [
        f"model.{key}: {there.get(key)!r} there, {here.get(key)!r} here"
        for key in sorted(here.keys() | there)
        if here.get(key) != there.get(key)
    ]
    return [f"another model than the checkpoint's: {'; '.join(found)}"] if found else []


def _facts(config: ModelConfig) -> dict[str, Any]:
    """All that `config` says, with the options of the mixers it uses."""
    sections = ("mixers", "ffns", "routers")
    names = {field.name for field in dataclasses.fields(config)} - {"preset", *sections}
    found: dict[str, Any] = {name: getattr(config, name) for name in names}
    for spec in config.layers():
        values = dataclasses.asdict(make_options(spec.mixer, spec.options))
        found |= {f"mixers.{spec.name}.{key}": value for key, value in values.items()}
    for section in sections[1:]:
        for name, values in getattr(config, section).items():
            found |= {f"{section}.{name}.{key}": value for key, value in values.items()}
    return found


def _optional_names(config: ModelConfig) -> set[str]:
    """`Decoder.optional_names` of the whole model."""
    with torch.device("meta"):
        return Decoder(config).optional_names()
