"""The data of a run: what it trains on, what it is validated on, and what it notes of both."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from rondo.errors import UserError
from rondo.pretrain.data import Curriculum, Seen, TokenDataset, prepare_sources, read_seen
from rondo.pretrain.domains import open_held_out
from rondo.pretrain.parse import dump_recipe, recipe_differences
from rondo.pretrain.recipe import Recipe
from rondo.pretrain.stages import Stage, all_sources, plan_of, replayed_runs, stages_of

_SHOWN = 3
"""Differences that a message names."""


def open_data(
    recipe: Recipe, folder: Path, saved: Mapping[int, list[Any]] | None = None
) -> tuple[Curriculum, dict[str, TokenDataset]]:
    """What `recipe` trains on, and held-out text by domain (none without `evals.batches`). `folder`
    is the run's, which keeps what other runs had seen when it began to replay them; `saved` is what
    it streamed so far (`start.saved_streams`)."""
    stages = stages_of(recipe)
    by_name = {stage.name: stage for stage in stages}
    seen = {
        (name, source): read_seen(source, replay_file(folder, by_name[name], source))
        for name, source in replayed_runs(stages)
    }
    data = dataclasses.replace(recipe.data, sources=all_sources(recipe))
    sources = prepare_sources(data, recipe.seed, saved)
    training = Curriculum(recipe, sources, recipe.model.vocab_size, seen)
    held_out = open_held_out(recipe, sources, training) if recipe.evals.batches else {}
    return training, held_out


def require_same_seen(seen: Mapping[tuple[str, str], Seen]) -> None:
    """Raises UserError, on all ranks, where they have read different records of what another run
    had `seen` (by stage and source): that run may save while the ranks of this one begin, each at
    its own time. Collective."""
    if not seen or not dist.is_initialized():
        return
    own = {key: f"step {each.record['step']} ({each.digest()[:8]})" for key, each in seen.items()}
    of_ranks = [own] * dist.get_world_size()
    dist.all_gather_object(of_ranks, own)
    for rank, there in enumerate(of_ranks):
        for (stage, source), found in there.items():
            first = of_ranks[0][stage, source]
            if found != first:
                raise UserError(
                    f"replay.source: {source} had come to {first} where rank 0 read it, and to "
                    f"{found} where rank {rank} did: it has saved meanwhile; start again, or name "
                    "one of its checkpoints instead"
                )


def describe_run(recipe: Recipe, folder: Path, training: Curriculum) -> None:
    """Writes what the run is into its folder: recipe, stages, and what it replays of others."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(dump_recipe(recipe))
    plan = folder / "stages.json"
    if recipe.stages:
        plan.write_text(json.dumps(plan_of(recipe), indent=1))
    else:
        plan.unlink(missing_ok=True)
    by_name = {stage.name: stage for stage in stages_of(recipe)}
    for (name, source), seen in training.seen.items():
        seen.write(replay_file(folder, by_name[name], source))


def require_same_recipe(folder: Path, recipe: Recipe) -> None:
    """Raises UserError where `folder` holds a run of another recipe, and says what differs."""
    there = folder / "recipe.yaml"
    different = recipe_differences(there, recipe) if there.is_file() else []
    if different:
        more = len(different) - _SHOWN
        raise UserError(
            f"{folder}: holds a run of another recipe ({'; '.join(different[:_SHOWN])}"
            f"{f'; and {more} more' if more > 0 else ''}); give another --name, or delete it"
        )


def replay_file(folder: Path, stage: Stage, source: str) -> Path:
    """Where a run keeps what another run, a `source` of the replay of a stage, had seen."""
    assert stage.replay is not None, "the caller has seen to it"
    place = stage.replay.sources.index(source)
    which = f".{place}" if place else ""
    return folder / "replay" / f"{stage.number}-{stage.name}{which}.json"
