"""What the README shows is true."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml

from rondo.launch.cli import _COMMANDS
from rondo.pretrain import load_recipe

pytestmark = pytest.mark.quick
ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def commands(start: str) -> list[list[str]]:
    """Indented lines of the README that begin with `start`, without their comments."""
    lines = re.findall(rf"^    ({start} .*)$", README, re.MULTILINE)
    return [shlex.split(line, comments=True) for line in lines]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """The README's recipe, as my.yaml."""
    block = re.search(r"^    name: my-run\n(?:    .*\n)+", README, re.MULTILINE)[0]
    path = tmp_path / "my.yaml"
    path.write_text(re.sub(r"^    ", "", block, flags=re.MULTILINE))
    return path


def test_the_recipe_in_the_readme_is_valid(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.model.preset == "gated-deltanet-340m" and recipe.model.num_layers == 24
    assert set(yaml.safe_load(path.read_text())["data"]) <= set(vars(recipe.data))


def test_commands_in_the_readme_are_valid() -> None:
    found = commands("rondo")
    assert len(found) >= 3
    for _, name, *words in found:
        assert name in _COMMANDS
        if name == "train":
            load_recipe(words[0], words[1:])


def test_the_recipe_in_the_readme_runs_on_the_ranks_shown(path: Path) -> None:
    found = commands("torchrun")
    assert len(found) >= 3
    for words in found:
        ranks, name = int(words[words.index("--nproc-per-node") + 1]), words.index("my.yaml")
        load_recipe(path, words[name + 1 :], world_size=ranks)


def test_targets_in_the_readme_exist() -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"make (\w+)", README)) <= targets


def test_links_in_the_docs_exist() -> None:
    for page in [*ROOT.glob("*.md"), *ROOT.glob("*/*.md"), *ROOT.glob("*/*/*.md")]:
        if ".venv" in page.parts or ".typing" in page.parts:
            continue
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page} links to {link}"
