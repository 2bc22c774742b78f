"""Where a run begins: its own newest checkpoint, that of another run, or another's parameters."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.optim import Optimizer

from rondo.errors import UserError
from rondo.models import Decoder, ModelConfig
from rondo.models.config import make_options
from rondo.models.loading import find_checkpoint
from rondo.parallel.checkpoint import (
    Changes,
    Checkpointer,
    copy_to_twins,
    model_tensors,
    optimizer_tensors,
)
from rondo.pretrain.data import Tokenizer, load_tokenizer
from rondo.pretrain.recipe import CheckpointConfig, Recipe


class Origin(NamedTuple):
    """What a run begins with while its folder has no checkpoint of its own."""

    path: Path
    whole: bool
    """It goes on there; else it takes the parameters alone."""


def find_origin(config: CheckpointConfig) -> Origin | None:
    """Of `checkpoint.resume` and `checkpoint.init_from`. Raises UserError where nothing is."""
    if config.resume not in ("auto", "never"):
        return Origin(find_checkpoint(Path(config.resume)), True)
    if config.init_from is not None:
        return Origin(find_checkpoint(Path(config.init_from)), False)
    return None


def begin(
    checkpointer: Checkpointer,
    parts: Sequence[Decoder],
    optimizers: Sequence[Optimizer],
    recipe: Recipe,
    tokenizer: Tokenizer,
    state: dict[str, Any],
    origin: Origin | None,
) -> tuple[dict[str, Any], list[str]]:
    """Fills parameters and optimizers from the run's own newest checkpoint, else from `origin`.

    The run's own checkpoint must be of the same model to the last tensor. That of another run may
    differ in what is trained and in optional buffers (`Checkpointer.changes`).

    Args:
        state: that of a new run.

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
    path, config = origin.path, parts[0].config
    tensors = {
        "model": model_tensors(parts),
        "optimizer": optimizer_tensors(parts, optimizers),
    }
    changes = Changes({}, {})
    if own is None:
        changes = checkpointer.changes(path, tensors, _optional_names(config))
    stored = changes.stored(tensors)
    if origin.whole:
        saved = checkpointer.load(path, stored, dropped=changes.dropped)
        _check_state(saved, state, recipe, path)
        lines = [f"going on after step {saved['step']}, from {path}", str(changes)]
    else:
        check_tokenizer(tokenizer, path)
        dropped = {"model": changes.dropped["model"]}
        checkpointer.load(path, {"model": stored["model"]}, dropped=dropped)
        saved, lines = state, [f"beginning with the parameters of {path}"]
    copy_to_twins(parts, optimizers)
    return saved, [line for line in (*lines, *model_differences(path, config)) if line]


def _check_state(
    saved: Mapping[str, Any], state: Mapping[str, Any], recipe: Recipe, path: Path
) -> None:
    if saved["data"] != state["data"]:
        raise UserError(
            f"data: {path} was trained on other data (sources, weights, tokenizer, "
            "sequence_length or seed differ), so its place in the data is lost; "
            "checkpoint.init_from takes its parameters alone"
        )
    if saved["step"] > recipe.steps:
        raise UserError(f"steps: {recipe.steps}, but {path} is after step {saved['step']}")


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
