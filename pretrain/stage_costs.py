"""What a pipeline's stages are cut by: the same in every start of a run, so that it goes on
exactly as it was."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist

from rondo.errors import UserError
from rondo.models import ModelConfig
from rondo.parallel.build import PRECISIONS
from rondo.parallel.layer_times import measure_layers
from rondo.parallel.mesh import Ranks
from rondo.parallel.pipeline import layer_flops
from rondo.pretrain.recipe import Recipe

FILE = "layer_times.json"


def stage_costs(
    recipe: Recipe, config: ModelConfig, folder: Path, ranks: Ranks
) -> list[float] | None:
    """Seconds of each layer, measured on rank 0 when the run first starts and kept in its folder;
    None where there is no pipeline or FLOPs are to decide. Collective."""
    if ranks.layout.pp == 1 or recipe.parallel.stage_costs == "flops":
        return None
    given: list[Any] = [None]
    if ranks.rank == 0:
        given = [_kept_or_measured(recipe, config, folder, ranks)]
    dist.broadcast_object_list(given, device=ranks.device)
    return given[0]


def _kept_or_measured(
    recipe: Recipe, config: ModelConfig, folder: Path, ranks: Ranks
) -> list[float]:
    file, length = folder / FILE, recipe.data.sequence_length
    of: dict[str, Any] = {"model": asdict(config), "length": length, "precision": recipe.precision}
    of = json.loads(json.dumps(of))
    if file.exists():
        try:
            kept = json.loads(file.read_text())
            if kept["of"] == of:
                return kept["seconds"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{file}: damaged ({error!r}); delete it to have layers measured anew, after which "
                "the stages of this run may be cut elsewhere"
            ) from error
    # What a rank holds fits on it; what grows with the length beyond that, FLOPs say.
    stretch = max(1, length // ranks.layout.cp)
    seconds = measure_layers(config, stretch, PRECISIONS[recipe.precision], ranks.device)
    whole, part = layer_flops(config, length), layer_flops(config, stretch)
    seconds = [time * a / b for time, a, b in zip(seconds, whole, part, strict=True)]
    folder.mkdir(parents=True, exist_ok=True)
    new = file.with_suffix(".new")
    new.write_text(json.dumps({"seconds": seconds, "of": of}, indent=1))
    new.rename(file)
    return seconds
