"""Runs Python code as where nothing is installed but torch, triton, numpy and pytest.

python tests/gpu/bare.py CODE [ARGUMENT...]
"""

from __future__ import annotations

import importlib.metadata as metadata
import re
import sys
from collections.abc import Iterable
from typing import Any

INSTALLED = ("torch", "triton", "numpy", "pytest")


def with_needs(names: Iterable[str]) -> set[str]:
    """Distributions and those that they need."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = _plain(waiting.pop())
        if name in found:
            continue
        found.add(name)
        try:
            needs = metadata.requires(name) or []
        except metadata.PackageNotFoundError:  # for another system
            continue
        waiting += [re.split(r"[^\w.-]", need)[0] for need in needs if "extra ==" not in need]
    return found


def others() -> set[str]:
    """Modules of all other distributions here."""
    allowed = {*with_needs(INSTALLED), "rondo"}
    return {
        module
        for module, owners in metadata.packages_distributions().items()
        if not allowed & {_plain(owner) for owner in owners}
    }


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


class Without:
    """A finder that does not find some modules."""

    def __init__(self, finder: Any, hidden: set[str]) -> None:
        self.finder, self.hidden = finder, hidden

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.partition(".")[0] in self.hidden:
            return None
        return self.finder.find_spec(name, path, target)


if __name__ == "__main__":
    hidden = others()
    sys.meta_path[:] = [Without(finder, hidden) for finder in sys.meta_path]
    code = sys.argv.pop(1)
    exec(code, {"__name__": "bare"})
