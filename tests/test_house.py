"""The rules of the house: who imports whom, and what is packaged."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest

from rondo.models import MIXERS

pytestmark = pytest.mark.quick

ROOT = Path(__file__).parents[1]
FOLDERS = ("kernels", "models", "parallel", "pretrain", "evals", "launch")
# A folder may import itself and these; `launch` reaches the others inside its commands only.
MAY_IMPORT = {
    "kernels": set(),
    "models": {"kernels", "errors"},
    "parallel": {"models", "kernels", "errors"},
    "pretrain": {"parallel", "models", "kernels", "errors", "goodput"},
    "evals": {"pretrain", "models", "errors", "goodput"},
    "launch": {"errors", "goodput"},
}
MAY_USE = {"kernels": {"torch", "triton", "flash_attn", "flash_attn_interface"}, "launch": set()}


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def imports(path: Path, *, top_level: bool) -> set[str]:
    """Dotted names a file imports; with `top_level`, only when it is itself imported."""
    tree = ast.parse(path.read_text())
    skipped = set()
    for node in ast.walk(tree):
        if top_level and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            skipped |= set(ast.walk(node))
    names: set[str] = set()
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("folder", FOLDERS)
def test_imports_point_upward(folder: str) -> None:
    for path in sources(folder):
        for name in imports(path, top_level=folder == "launch"):
            parts = name.split(".")
            if parts == ["rondo"]:
                continue
            if parts[0] == "rondo":
                allowed = {folder, "__version__"} | MAY_IMPORT[folder]
                assert parts[1] in allowed, f"{path} imports {name}"
            elif folder in MAY_USE and parts[0] not in sys.stdlib_module_names:
                assert parts[0] in MAY_USE[folder], f"{path} imports {name}"


def test_models_know_nothing_of_ranks() -> None:
    for path in sources("models"):
        for name in imports(path, top_level=False):
            assert not name.startswith("torch.distributed"), f"{path} imports {name}"


def test_parallel_names_no_mixer() -> None:
    """But for attention, an operator of `kernels` too, whose form over ranks is there."""
    assert {"attention", "gru", "lstm"} <= {*MIXERS}
    for path in sources("parallel"):
        text = path.read_text()
        for name in MIXERS.keys() - {"attention"}:
            assert not re.search(rf"\b{name}\b", text), f"{path} names the mixer {name}"


def test_packages_are_listed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    listed = set(project["tool"]["setuptools"]["packages"])
    found = {"rondo"}
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("__init__.py"):
            found.add(".".join(("rondo", *path.parent.relative_to(ROOT).parts)))
    assert listed == found
    data = project["tool"]["setuptools"]["package-data"]
    for path in ROOT.glob("*/**/*.yaml"):
        top = path.relative_to(ROOT).parts[0]
        if top in FOLDERS:
            relative = path.relative_to(ROOT / top)
            patterns = data.get(f"rondo.{top}", [])
            assert any(relative.match(pattern) for pattern in patterns), f"{path} is not packaged"


def test_every_folder_explains_itself() -> None:
    for folder in FOLDERS:
        if (ROOT / folder).exists():
            assert (ROOT / folder / "README.md").exists(), f"{folder} has no README.md"
