"""What `rondo plan` says of repeated data, as far as the recipe's sources are prepared."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from rondo.pretrain.data.duplicates import read_multiplicities
from rondo.pretrain.data.mixture import Mixture
from rondo.pretrain.data.repeats import Repeats, account, check_epochs, describe, warnings
from rondo.pretrain.data.replay import Share
from rondo.pretrain.data.token_files import TokenFile
from rondo.pretrain.recipe import Recipe
from rondo.pretrain.reweight import domain_names
from rondo.pretrain.stages import all_sources, source_keys, stages_of


def planned_repeats(recipe: Recipe) -> list[Repeats] | None:
    """How `recipe` will read its sources, without reading their tokens; None unless each source
    names a prepared folder. Raises UserError where one is read more often than it allows."""
    sources = all_sources(recipe)
    folders = [Path(source.path).expanduser() for source in sources]
    if not all((folder / "train.idx").is_file() for folder in folders):
        return None
    unique = {i: TokenFile(folder / "train").num_tokens for i, folder in enumerate(folders)}
    counts, keys = dict.fromkeys(unique, 0), source_keys(sources)
    for stage in stages_of(recipe):
        samples = stage.steps * recipe.data.global_batch_size
        new = samples - Share(stage.replay.share if stage.replay else 0.0).before(samples)
        mixture = Mixture([source.weight for source in stage.sources])
        for key, count in zip(source_keys(stage.sources), mixture.counts(new), strict=True):
            counts[keys.index(key)] += count
    copies = {i: read_multiplicities(folder) for i, folder in enumerate(folders)}
    length = recipe.data.sequence_length
    found = account(domain_names(sources), unique, counts, length, copies)
    check_epochs(found, recipe.data.max_epochs)
    return found


def show_repeats(recipe: Recipe, parameters: int, console: Console) -> None:
    """Prints the epochs of every source, and what to be warned of."""
    found = planned_repeats(recipe)
    lines = ["data: epochs are known when all sources are prepared folders (rondo prepare)"]
    if found is not None:
        lines = [*describe(found), *warnings(found, parameters)]
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def repeats_data(recipe: Recipe, parameters: int) -> dict[str, Any] | None:
    """The same for JSON; None where sources are not prepared."""
    found = planned_repeats(recipe)
    if found is None:
        return None
    sources = [{**asdict(each), "epochs": each.epochs, "worth": each.effective} for each in found]
    return {"sources": sources, "warnings": warnings(found, parameters)}
