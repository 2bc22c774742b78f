"""Plain data (mappings, lists, text, numbers, true, false, null) as YAML, and nothing else.

YAML's surprises stay out: no tags that build objects, no aliases, no repeated keys, and of
unquoted words only `null`, `true`, `false` and numbers are not text (`off`, `1:30` and
`2024-01-01` are text; `3e-4` is a number).
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

import yaml

MAX_BYTES = 1_000_000

_WORDS = (  # what an unquoted word is, its form, its first characters
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(0|[1-9][0-9_]*)", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9][0-9_]*\.[0-9]*)([eE][-+]?[0-9]+)?|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+",
        list("-+.0123456789"),
    ),
)
_RESOLVERS: dict[str, list[tuple[str, re.Pattern[str]]]] = {}
for _kind, _form, _starts in _WORDS:
    for _start in _starts:
        _resolver = (f"tag:yaml.org,2002:{_kind}", re.compile(rf"(?:{_form})\Z"))
        _RESOLVERS.setdefault(_start, []).append(_resolver)


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = _RESOLVERS

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            _refuse("aliases (*name) are not supported; repeat the value", event)
        if getattr(event, "tag", None):
            _refuse(f"tags are not supported, got {event.tag!r}", event)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if str(key.value) in seen:
                _refuse(f"the key {key.value!r} is given twice", key)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep=deep)

    # What is too large for a number stays text, so that its key is named when a number is wanted.

    def number(self, node: Any) -> int | str:
        return int(node.value.replace("_", "")) if len(node.value) < 100 else node.value

    def fraction(self, node: Any) -> float | str:
        value = float(node.value.replace("_", ""))
        return value if math.isfinite(value) else node.value


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.number)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.fraction)


def _refuse(problem: str, at: Any) -> None:
    raise yaml.constructor.ConstructorError(None, None, problem, at.start_mark)


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers = _RESOLVERS

    def ignore_aliases(self, data: Any) -> bool:
        return True


def read_yaml(text: str | bytes) -> Any:
    """The plain data in `text`. Raises ValueError with one line that says what and where."""
    if len(text) > MAX_BYTES:
        raise ValueError(f"{len(text)} bytes of YAML are more than the limit of {MAX_BYTES}")
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ValueError(f"{where}{' '.join(str(error.problem).split())}") from error
    except RecursionError as error:
        raise ValueError("the YAML is nested too deeply") from error
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error


def write_yaml(data: Any) -> str:
    """YAML that `read_yaml` reads back equal, floats to the last bit."""
    return yaml.dump(
        data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=None, width=96
    )


def show(value: Any, limit: int = 60) -> str:
    """`value` for a message: one printable line of at most about `limit` characters."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    if not text.isprintable():
        text = json.dumps(value, default=str)
    return text if len(text) <= limit else f"{text[: limit - 10]}... ({len(text)} characters)"
