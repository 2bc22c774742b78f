"""Command lines into plain data and dataclasses, and the help that goes with them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from rondo.pretrain.plain import read_yaml, show
from rondo.pretrain.typed import RecipeError, Text, build, item_class, leaves

T = TypeVar("T")


@dataclass
class Arguments:
    """A command line, taken apart."""

    positional: list[str] = field(default_factory=list)
    options: list[tuple[str, Text]] = field(default_factory=list)
    """Dotted key and value of each `--key value` or `--key=value`, in order."""
    problems: list[str] = field(default_factory=list)
    wants_help: bool = False


def split_arguments(argv: Sequence[str]) -> Arguments:
    """Takes `argv` apart. The word after an option without `=` is its value, unless it is one."""
    found, rest = Arguments(), list(argv)
    while rest:
        word = rest.pop(0)
        if word in ("-h", "--help"):
            found.wants_help = True
        elif not word.startswith("--"):
            found.positional.append(word)
        else:
            key, equals, value = word[2:].partition("=")
            if not equals and (not rest or rest[0].startswith("--")):
                found.problems.append(f"{key}: needs a value, as in --{key} VALUE or --{key}=VALUE")
                continue
            found.options.append((key, Text(value if equals else rest.pop(0))))
    return found


def put(tree: dict[str, Any], key: str, value: Text) -> None:
    """Sets dotted `key` (a number is an index) of plain data.

    Names that are missing are added: whether they belong there is for `build` to say. Raises
    ValueError where the path leads below a number or text, or beyond the end of a list.
    """
    node: Any = tree
    *path, last = key.split(".")
    for name in path:
        if isinstance(node, dict):
            node.setdefault(name, {})
        step = _step(node, name)
        if isinstance(node[step], Text):  # given as a whole by an option before this one
            node[step] = read_yaml(str(node[step]))
        node = node[step]
    node[_step(node, last)] = value


def _step(node: Any, name: str) -> str | int:
    if isinstance(node, dict):
        return name
    if not isinstance(node, list):
        raise ValueError(f"{show(node)} has no keys, so nothing to set at {name!r}")
    if not name.isdecimal() or int(name) >= len(node):
        raise ValueError(f"the list has {len(node)} items, counted from 0, not {name!r}")
    return int(name)


def put_all(tree: dict[str, Any], options: Sequence[tuple[str, Text]]) -> list[str]:
    """Puts every option into `tree`, in order, and returns what is wrong."""
    problems = []
    for key, value in options:
        try:
            put(tree, key, value)
        except ValueError as error:
            problems.append(f"{key}: cannot be set to {show(str(value))}: {error}")
    return problems


def parse_command(
    cls: type[T], argv: Sequence[str], usage: str, positional: Sequence[str] = ()
) -> T | None:
    """As `parse_dataclass`; None after `--help`, which is printed."""
    if split_arguments(argv).wants_help:
        print(help_text(cls, usage), end="")
        return None
    return parse_dataclass(cls, argv, " ".join(usage.split()[:2]), positional)


def parse_dataclass(
    cls: type[T], argv: Sequence[str], command: str, positional: Sequence[str] = ()
) -> T:
    """The `cls` that `argv` describes: `--field value`, and `positional` fields without a name.

    Raises RecipeError with all that is wrong; `command` is what it says it was typed for.
    """
    arguments, tree = split_arguments(argv), {}
    problems = arguments.problems
    for name, word in zip(positional, arguments.positional, strict=False):
        tree[name] = Text(word)
    for word in arguments.positional[len(positional) :]:
        problems.append(f"{word}: unexpected; options are written --key value")
    problems += put_all(tree, arguments.options)
    config, wrong = build(cls, tree)
    if problems or wrong:
        raise RecipeError([*problems, *wrong], command)
    return config


def help_text(cls: type, usage: str, description: str = "") -> str:
    """Help with every key of `cls`: type, default and the text under the field, by section."""
    import jsonargparse  # takes a while to import, and only help needs it

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(usage=usage, description=description)
    parser.add_class_arguments(cls)
    keys = leaves(cls)
    for key, want in keys.items():
        if item := item_class(want):
            parser.add_class_arguments(item, f"{key}.N")
    shown = {*keys, "h", "help"}
    for action in parser._actions:  # leave out what jsonargparse adds of its own
        ours = [name for name in action.option_strings if name.lstrip("-") in shown]
        action.option_strings = ours
        action.help = action.help if ours else argparse.SUPPRESS
    return parser.format_help()
