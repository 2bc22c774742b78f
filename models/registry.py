"""Names to classes, filled by a decorator."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T", bound=type)


class Registry(dict[str, type]):
    """A dictionary of classes that names the nearest entry when a name is unknown."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def register(self, name: str) -> Callable[[T], T]:
        """Class decorator: enters the class as `name` (a ValueError if the name is taken)."""

        def enter(cls: T) -> T:
            if name in self:
                raise ValueError(f"{self.kind} {name!r} is registered already, by {self[name]}")
            self[name] = cls
            return cls

        return enter

    def unknown(self, name: str) -> str:
        """The message for a name that is not registered."""
        near = difflib.get_close_matches(name, self, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        return f"unknown {self.kind} {name!r}{hint} (known: {', '.join(sorted(self))})"


MIXERS = Registry("mixer")
FFNS = Registry("channel mixer")
ROUTERS = Registry("router")
