"""Plain data into dataclasses, with every wrong key and value found in one pass.

Types: dataclasses, lists, dictionaries, tuples of fixed length, `T | None`, unions of scalars
and lists of them, Literal, int, float, str, bool and Any. A bool is no int, text is no number, an
int is a fine float, numbers are finite.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import operator
import sys
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from rondo.errors import UserError
from rondo.pretrain.plain import read_yaml, show

T = TypeVar("T")

_MAX_INT = 2**63 - 1
_NAMES = {
    int: "a whole number",
    float: "a finite number",
    str: "text",
    bool: "true or false",
    Any: "a value",
}
_SAID_FOR_BOOL = {"yes": True, "on": True, "1": True, "no": False, "off": False, "0": False}


class RecipeError(UserError):
    """All that is wrong with a recipe, or with the options of a command."""

    def __init__(self, problems: Sequence[str], source: str) -> None:
        self.problems = list(problems)
        """One line each: the key, a colon, what is wrong with it."""
        lines = self.problems if len(problems) == 1 else [f"{len(problems)} problems", *problems]
        super().__init__(f"{source}: " + "\n  ".join(lines))


class Text(str):
    """A value typed on a command line: itself where text is wanted, YAML elsewhere."""


def build(cls: type[T], plain: Any) -> tuple[T, list[str]]:
    """`plain` as a `cls`, and what is wrong with it, one line for each key.

    Wrong values are replaced by defaults in the result, so that the rest can be checked further.
    """
    builder = _Builder(list(leaves(cls)))
    return builder.section(cls, plain, ""), builder.problems


class _Builder:
    def __init__(self, known: list[str]) -> None:
        self.problems: list[str] = []
        self.known = known  # every dotted key, to find the one that was meant

    def section(self, cls: Any, value: Any, key: str) -> Any:
        if not isinstance(value, dict):
            self.problems.append(f"{key or 'all'}: expected {describe(cls)}, got {show(value)}")
            return _placeholder(cls)
        prefix = f"{key}." if key else ""
        wanted = typing.get_type_hints(cls)
        for name in [name for name in value if name not in wanted]:
            meant = self.nearest_key(prefix, str(name), wanted)
            self.problems.append(
                f"{prefix}{_show_key(name)}: unknown key, got {show(value[name])}{meant}"
            )
        values = {}
        for field in dataclasses.fields(cls):
            name, want = field.name, wanted[field.name]
            before = len(self.problems)
            if name in value:
                values[name] = self.value(want, value[name], prefix + name)
            elif _is_required(field, want):
                self.problems.append(f"{prefix}{name}: required key, expected {describe(want)}")
            if len(self.problems) > before and not dataclasses.is_dataclass(want):
                values.pop(name, None)
        return _placeholder(cls, values)

    def value(self, want: Any, value: Any, key: str) -> Any:
        if isinstance(value, Text):
            try:
                value = from_text(value, want)
            except ValueError as error:
                self.wrong(want, str(value), key, f" ({error})")
                return _placeholder(want) if dataclasses.is_dataclass(want) else None
        if dataclasses.is_dataclass(want):
            return self.section(want, value, key)
        origin, args = get_origin(want), get_args(want)
        if types.NoneType in args:
            return None if value is None else self.value(_not_none(want), value, key)
        if origin is list and isinstance(value, list):
            return [self.value(args[0], item, f"{key}.{i}") for i, item in enumerate(value)]
        if origin is tuple and isinstance(value, list) and len(value) == len(args):
            parts = enumerate(zip(args, value, strict=True))
            return tuple(self.value(arg, item, f"{key}.{i}") for i, (arg, item) in parts)
        if (origin is dict or want is Any) and isinstance(value, dict):
            for name in [name for name in value if not isinstance(name, str)]:
                self.problems.append(f"{key}: names must be text, got {show(name)}")
            inner = args[1] if args else Any
            return {k: self.value(inner, v, f"{key}.{k}") for k, v in value.items()}
        if not _fits(value, want):
            self.wrong(want, value, key, _suggestion(want, value))
        elif want is float:
            return float(value)
        return value

    def wrong(self, want: Any, value: Any, key: str, more: str) -> None:
        self.problems.append(f"{key}: expected {describe(want)}, got {show(value)}{more}")

    def nearest_key(self, prefix: str, name: str, siblings: Iterable[str]) -> str:
        near = difflib.get_close_matches(name, siblings, n=1)
        if near:
            return f"; did you mean {prefix}{near[0]}?"
        by_last_part = {key.rpartition(".")[2]: key for key in reversed(self.known)}
        near = difflib.get_close_matches(name, by_last_part, n=1, cutoff=0.8)
        if near:
            return f"; did you mean {by_last_part[near[0]]}?"
        return f" (keys here: {', '.join(siblings)})"


def leaves(cls: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted names of all values below dataclass `cls`, and their types; N stands for an index."""
    found: dict[str, Any] = {}
    for name, want in typing.get_type_hints(cls).items():
        key = prefix + name
        if dataclasses.is_dataclass(want):
            found |= leaves(want, f"{key}.")
            continue
        found[key] = want
        if item := item_class(want):
            found |= leaves(item, f"{key}.N.")
    return found


def item_class(want: Any) -> type | None:
    """The dataclass of the items if `want` is a list of dataclasses."""
    item = get_args(want)[0] if get_origin(want) is list else None
    return item if isinstance(item, type) and dataclasses.is_dataclass(item) else None


def from_text(text: str, want: Any) -> Any:
    """What `text`, typed for a value of type `want`, stands for. ValueError if it is no YAML."""
    if types.NoneType in get_args(want):
        return None if text in ("null", "~") else from_text(text, _not_none(want))
    if want is str:
        return str(text)
    value = read_yaml(str(text))
    return str(text) if _is_union(want) and not _fits(value, want) else value


def describe(want: Any) -> str:
    """The type `want` in words."""
    origin, args = get_origin(want), get_args(want)
    if want in _NAMES:
        return _NAMES[want]
    if dataclasses.is_dataclass(want):
        return f"keys with values ({', '.join(f.name for f in dataclasses.fields(want))})"
    if types.NoneType in args:
        return f"{describe(_not_none(want))} or null"
    if _is_union(want):
        return " or ".join(map(describe, args))
    if origin is Literal:
        return f"one of {', '.join(map(str, args))}"
    if origin is list:
        return f"a list, each item {describe(args[0])}"
    if origin is tuple:
        return f"a list of {len(args)}: {', '.join(map(describe, args))}"
    return "names with values" if origin is dict else str(want)


def _has_default(field: dataclasses.Field[Any]) -> bool:
    missing = dataclasses.MISSING
    return field.default is not missing or field.default_factory is not missing


def _is_required(field: dataclasses.Field[Any], want: Any) -> bool:
    if _has_default(field):
        return False
    if not dataclasses.is_dataclass(want):
        return True
    hints = typing.get_type_hints(want)  # a section may be left out if nothing in it is required
    return any(_is_required(inner, hints[inner.name]) for inner in dataclasses.fields(want))


def _placeholder(cls: Any, values: Mapping[str, Any] | None = None) -> Any:
    """A `cls` of `values` and defaults, with something of the right type for what is required."""
    hints = typing.get_type_hints(cls)
    filled = dict(values or {})
    for field in dataclasses.fields(cls):
        want = hints[field.name]
        if field.name in filled or _has_default(field):
            continue
        if dataclasses.is_dataclass(want):
            filled[field.name] = _placeholder(want)
        else:
            filled[field.name] = want() if isinstance(want, type) else None
    return cls(**filled)


def _not_none(want: Any) -> Any:
    rest = [arg for arg in get_args(want) if arg is not types.NoneType]
    return functools.reduce(operator.or_, rest)


def _is_union(want: Any) -> bool:
    return get_origin(want) in (Union, types.UnionType)


def _fits(value: Any, want: Any) -> bool:
    if want is Any:
        return True
    if _is_union(want):
        return any(_fits(value, kind) for kind in get_args(want))
    if get_origin(want) is list:
        return type(value) is list and all(_fits(item, get_args(want)[0]) for item in value)
    if get_origin(want) is Literal:
        return any(value == choice and type(value) is type(choice) for choice in get_args(want))
    if want is float:
        return type(value) in (int, float) and abs(value) <= sys.float_info.max
    if want is int:
        return type(value) is int and abs(value) <= _MAX_INT
    return type(value) is want


def _suggestion(want: Any, value: Any) -> str:
    near: Any = None
    if get_origin(want) is Literal:
        choices = difflib.get_close_matches(str(value), map(str, get_args(want)), n=1)
        return f"; did you mean {choices[0]}?" if choices else ""
    if get_origin(want) is list and isinstance(value, str):
        return f"; did you mean [{value}]?"
    if want is str and isinstance(value, (bool, int, float)):
        return f'; did you mean "{show(value)}"?'
    if want is bool:
        near = _SAID_FOR_BOOL.get(str(value).lower())
    elif want is int and isinstance(value, float) and value.is_integer():
        near = int(value)
    elif want is int and type(value) is int:
        return f" (the largest is {_MAX_INT})"
    elif isinstance(value, str):
        with contextlib.suppress(ValueError):
            near = read_yaml(value)
    return f"; did you mean {show(near)}?" if near is not None and _fits(near, want) else ""


def _show_key(name: Any) -> str:
    plain = isinstance(name, str) and name.isprintable() and 0 < len(name) <= 60
    return name if plain else show(name)
