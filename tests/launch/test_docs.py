"""What the READMEs show is true."""

from __future__ import annotations

import re
import shlex
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from rondo.errors import UserError
from rondo.launch.cli import _COMMANDS
from rondo.launch.options import parse_launch
from rondo.pretrain import load_recipe

pytestmark = pytest.mark.quick
ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def commands(start: str, text: str = README) -> list[list[str]]:
    """Indented lines that begin with `start`, joined where one goes on in the next, without their
    comments: what follows a `#` or three spaces."""
    lines = re.findall(rf"^    ({start} (?:.*\\\n)*.*)$", text, re.MULTILINE)
    joined = (re.sub(r"\\\n\s*", "", line) for line in lines)
    return [shlex.split(re.sub(r" {3,}.*", "", line), comments=True) for line in joined]


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
        check_torchrun(words, path)


@pytest.mark.parametrize(("folder", "least"), [("parallel", 4), ("pretrain", 4), ("launch", 9)])
def test_commands_of_a_folder_are_valid(folder: str, least: int, path: Path) -> None:
    """Of `rondo` and of torchrun, with the recipe of the first page where one says my.yaml."""
    text = (ROOT / folder / "README.md").read_text()
    own, torchrun = commands("rondo", text), commands("torchrun", text)
    assert len(own) + len(torchrun) >= least
    for _, name, *words in own:
        assert name in _COMMANDS
        if name == "train" and "--help" not in words:
            load_recipe(named(words[0], path), words[1:])
        elif name == "launch":
            options, overrides = parse_launch(words)
            ranks = getattr(options, "nodes", 1) * (options.processes or options.gpus)
            load_recipe(named(options.recipe, path), overrides, world_size=ranks)
    for words in torchrun:
        check_torchrun(words, path)


def test_a_command_that_a_page_gets_wrong_is_noticed(path: Path) -> None:
    text = "    torchrun --nproc-per-node 8 -m rondo.pretrain tiny \\\n        --steps 3  # few\n"
    (words,) = commands("torchrun", text)
    assert words[-3:] == ["tiny", "--steps", "3"]
    with pytest.raises(UserError, match=r"micro_batch_size: 4 does not divide"):
        check_torchrun(words, path)


def check_torchrun(words: list[str], path: Path) -> None:
    """The module of a torchrun command is there, and its recipe runs on the ranks shown."""
    ranks, at = int(words[words.index("--nproc-per-node") + 1]), words.index("-m")
    module, recipe, *overrides = words[at + 1 :]
    assert find_spec(module) is not None
    if module == "rondo.pretrain":
        load_recipe(named(recipe, path), overrides, world_size=ranks)


def named(recipe: str, path: Path) -> str | Path:
    """A bundled recipe by its name; the README's by its file."""
    return path if recipe == "my.yaml" else recipe


def test_targets_in_the_readme_exist() -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"make (\w+)", README)) <= targets


def test_links_in_the_docs_exist() -> None:
    for page in [*ROOT.glob("*.md"), *ROOT.glob("*/*.md"), *ROOT.glob("*/*/*.md")]:
        if ".venv" in page.parts or ".typing" in page.parts:
            continue
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page} links to {link}"
