"""From a recipe file and overrides to a checked `Recipe`, and back to a file."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import os
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, get_type_hints

from rondo.errors import UserError
from rondo.models.config import ModelConfig, preset_values
from rondo.pretrain import validate
from rondo.pretrain.options import put_all, split_arguments
from rondo.pretrain.plain import MAX_BYTES, read_yaml, show, write_yaml
from rondo.pretrain.recipe import Recipe
from rondo.pretrain.typed import RecipeError, Text, build, leaves

__all__ = ["RecipeError", "bundled_recipes", "dump_recipe", "load_recipe"]

_SUFFIXES = (".yaml", ".yml")
_LONG = 200
"""Characters of a value that differs from another, which paths may do at their ends."""


def load_recipe(
    path_or_name: str | Path, overrides: Sequence[str] = (), *, world_size: int | None = None
) -> Recipe:
    """The recipe in a YAML file, or a bundled one by its name, with overrides put on top.

    Overrides are words of a command line: `--data.sources.0.weight 2` or `--steps=5`. Where they
    and the file are silent, `model.preset` speaks, then the defaults. With `world_size`, the
    number of ranks, the layout is checked too. Raises RecipeError, which lists every problem.
    """
    source = str(path_or_name)
    try:
        given = read_yaml(_read_file(source))
    except ValueError as error:
        raise RecipeError([str(error)], source) from error
    if given is None:
        given = {}
    if not isinstance(given, dict):
        raise RecipeError([f"expected keys with values, got {show(given)}"], source)

    arguments = split_arguments(overrides)
    problems = arguments.problems
    for word in arguments.positional:
        problems.append(f"{show(word)}: unexpected; overrides are written --section.key value")
    tree, wrong = _assemble(given, arguments.options)
    recipe, mistyped = build(Recipe, tree)
    problems = [*problems, *wrong, *mistyped]
    problems += validate.problems(recipe, world_size, unread=_unread(problems))
    if problems:
        raise RecipeError(problems, source)
    return recipe


def dump_recipe(recipe: Recipe) -> str:
    """YAML with every key, which `load_recipe` reads back equal."""
    return write_yaml(dataclasses.asdict(recipe))


def recipe_differences(path: Path, recipe: Recipe) -> list[str]:
    """Keys whose values in the recipe file at `path` are not those of `recipe`, with both values.
    Raises RecipeError where there is no YAML in it."""
    try:
        there, here = (_flat(read_yaml(text)) for text in (path.read_text(), dump_recipe(recipe)))
    except ValueError as error:
        raise RecipeError([str(error)], str(path)) from error
    return [
        f"{key}: {show(there[key], _LONG) if key in there else 'none'} there, "
        f"{show(here[key], _LONG) if key in here else 'none'} now"
        for key in dict.fromkeys([*there, *here])
        if (key in there, there.get(key)) != (key in here, here.get(key))
    ]


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """The values of plain data by their dotted keys."""
    if not isinstance(tree, dict | list) or not tree:
        return {prefix: tree}
    found: dict[str, Any] = {}
    for name, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        found |= _flat(value, f"{prefix}.{name}" if prefix else str(name))
    return found


def bundled_recipes() -> dict[str, str]:
    """Text of each recipe that comes with rondo, by name."""
    folder = resources.files("rondo") / "launch" / "recipes"
    files = [file for file in folder.iterdir() if file.name.endswith(_SUFFIXES)]
    return {file.name.rpartition(".")[0]: file.read_text("utf-8") for file in files}


def _unread(problems: Sequence[str]) -> set[str]:
    """The recipe's keys with a value that is not the one given, because that has a problem."""
    bad = {problem.partition(":")[0] for problem in problems}
    return {
        key
        for key in leaves(Recipe)
        if any(f"{key}.".startswith(f"{at}.") or at.startswith(f"{key}.") for at in bad)
    }


def _read_file(source: str) -> str | bytes:
    bundled = bundled_recipes()
    if source in bundled:
        return bundled[source]
    if not os.path.isfile(source):
        stem = Path(source).name.removesuffix(".yaml")
        near = difflib.get_close_matches(stem, bundled, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(
            f"no such recipe file{hint} (bundled recipes: {', '.join(sorted(bundled))})"
        )
    with open(source, "rb") as file:
        return file.read(MAX_BYTES + 1)


def _assemble(
    given: dict[str, Any], options: Sequence[tuple[str, Text]]
) -> tuple[dict[str, Any], list[str]]:
    """Defaults, preset, file and options in one tree of plain data; and what is wrong."""
    defaults = read_yaml(dump_recipe(Recipe(name="", model=ModelConfig())))
    del defaults["name"]  # has no default
    tree = _merge(Recipe, defaults, copy.deepcopy(given))
    wrong = put_all(tree, options)
    model = tree.get("model")
    preset = model.get("preset") if isinstance(model, dict) else None
    if not isinstance(preset, str):
        return tree, wrong
    try:
        values = {"model": preset_values(str(preset))}
    except UserError as error:
        return tree, [*wrong, str(error)]
    tree = _merge(Recipe, _merge(Recipe, defaults, values), copy.deepcopy(given))
    return tree, put_all(tree, options)


def _merge(cls: type, base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` on top of `base`, section by section; lists and dictionaries are replaced whole."""
    wanted, merged = get_type_hints(cls), {**base, **over}
    for name in base.keys() & over.keys():
        if dataclasses.is_dataclass(wanted[name]) and isinstance(over[name], dict):
            merged[name] = _merge(wanted[name], base[name], over[name])
    return merged
