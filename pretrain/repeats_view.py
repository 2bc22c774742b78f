"""What `rondo plan` says of repeated data, as far as the recipe's sources are prepared."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from rondo.pretrain.data.mixture import Mixture
from rondo.pretrain.data.repeats import Repeats, account, describe, warnings
from rondo.pretrain.data.token_files import TokenFile
from rondo.pretrain.recipe import Recipe
from rondo.pretrain.reweight import domain_names


def planned_repeats(recipe: Recipe) -> list[Repeats] | None:
    """How `recipe` will read its sources, from their index files alone; None unless each source
    names a prepared folder."""
    folders = [Path(source.path).expanduser() for source in recipe.data.sources]
    if not all((folder / "train.idx").is_file() for folder in folders):
        return None
    unique = {i: TokenFile(folder / "train").num_tokens for i, folder in enumerate(folders)}
    mixture = Mixture([source.weight for source in recipe.data.sources])
    counts = mixture.counts(recipe.steps * recipe.data.global_batch_size)
    names = domain_names(recipe.data.sources)
    return account(names, unique, dict(enumerate(counts)), recipe.data.sequence_length)


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
