"""The `rondo` command: what it says, and the exit codes that scripts rely on."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import pytest

from rondo import errors
from rondo.errors import UserError, run_command
from rondo.launch.cli import _COMMANDS, main
from rondo.pretrain.recipe import Recipe
from rondo.pretrain.typed import leaves
from rondo.tests.forks import Fork, pretrain

ROOT = Path(__file__).parents[2]
KEYS = Path(__file__).with_name("recipe_keys.txt")


def start(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs `python *words` in the checkout."""
    return subprocess.run(
        [sys.executable, *words],
        env={**os.environ, "PYTHONPATH": str(ROOT / ".typing"), **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def flat(text: str) -> str:
    """`text` without line breaks and indentation."""
    return " ".join(text.split())


@pytest.fixture
def trained(monkeypatch) -> list[Recipe]:
    """Recipes that reached the training loop, which is a stand-in that returns their seed."""
    seen: list[Recipe] = []

    def train(recipe: Recipe, began: float) -> int:
        assert began > 0
        seen.append(recipe)
        return recipe.seed

    module = types.ModuleType("rondo.pretrain.train")
    module.train = train
    monkeypatch.setitem(sys.modules, "rondo.pretrain.train", module)
    return seen


def test_recipe_keys_are_frozen():
    """A new key is a promise to users: add it to recipe_keys.txt and to the release notes."""
    assert sorted(leaves(Recipe)) == KEYS.read_text().split()


def test_help_of_train_lists_every_key_with_type_default_and_meaning(capsys):
    assert main(["train", "--help"]) == 0
    text = capsys.readouterr().out
    for key in leaves(Recipe):
        assert re.search(rf"^  --{re.escape(key)}( |$)", text, re.MULTILINE), key
    shown = set(re.findall(r"^  --([\w.]+)", text, re.MULTILINE)) - {"help"}
    assert shown == set(leaves(Recipe))
    assert "Tokens in a sequence. (type: int, default: 512)" in flat(text)
    assert "Name of the run's folder. (required, type: str)" in flat(text)
    assert "Path to a configuration file" not in text  # jsonargparse's own, not ours
    assert "How gradients become updates:" in text
    assert "tiny" in text.partition("options:")[0]
    assert main(["train", "tiny", "-h"]) == 0
    assert capsys.readouterr().out == text


@pytest.mark.parametrize("words", [[], ["-h"], ["--help"]])
def test_help(words, capsys):
    assert main(words) == 0
    text = capsys.readouterr().out
    assert all(f"  {command} " in text for command in _COMMANDS)


def test_help_of_other_commands(capsys):
    for command, key in (("prepare", "--input"), ("generate", "--prompt"), ("eval", "--tasks")):
        assert main([command, "--help"]) == 0
        text = capsys.readouterr().out
        assert f"usage: rondo {command} " in text
        assert f"\n  {key} " in text


def test_version(capsys):
    assert main(["--version"]) == 0
    assert re.fullmatch(r"rondo \d+\.\d+\.\d+\n", capsys.readouterr().out)


def test_a_mistyped_command_gives_the_nearest(capsys):
    assert main(["trian", "tiny"]) == 2
    out, err = capsys.readouterr()
    assert err == (
        "rondo: error: unknown command 'trian'; did you mean train? "
        "(commands: prepare, train, launch, status, stop, evals, report, plan, "
        "anneal, forgetting, compare, generate, export, import, eval)\n"
    )
    assert out == ""


def test_train_hands_the_recipe_over_and_the_exit_code_back(trained):
    assert main(["train", "tiny", "--seed", "75", "--data.sequence_length=32"]) == 75
    assert main(["train", "tiny", "--name", "tiny"]) == 0
    assert [recipe.name for recipe in trained] == ["tiny", "tiny"]
    assert (trained[0].seed, trained[0].data.sequence_length) == (75, 32)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train"], "which recipe?"),
        (["train", "--steps", "3", "tiny"], "which recipe? It comes first"),
        (["train", "tinny"], "did you mean tiny?"),
        (["train", "tiny", "--model.dmi", "3"], "model.dmi: unknown key"),
        (["train", "tiny", "--steps", "0"], "tiny: steps: must be at least 1"),
        (["train", "tiny", "--parallel.dp_shard", "2"], "but the run has 1"),
        (["prepare"], "2 problems\n  input: required key"),
        (["prepare", "--inptu", "x", "--output", "y"], "inptu: unknown key"),
        (["prepare", "x", "--input", "x", "--output", "y"], "x: unexpected"),
        (["generate", "x", "--prmpt", "y"], "did you mean prompt?"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(words, message, capsys, trained):
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert err.startswith("rondo: error: ") and message in err and "Traceback" not in err
    assert out == "" and trained == []


def test_exit_codes_of_the_process():
    done = start("-m", "rondo.launch.cli", "train", "tiny", "--optimizer.lr", "nan")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        'rondo: error: tiny: optimizer.lr: expected a finite number, got "nan"\n'
    )
    assert start("-m", "rondo.launch.cli", "--version").returncode == 0


def test_a_traceback_for_those_who_ask_for_it(tmp_path):
    missing = tmp_path / "missing.yaml"
    failed = Fork(tmp_path, pretrain, [str(missing)], environment={"RONDO_DEBUG": "1"})
    assert failed.end() == 2
    printed = failed.log.read_text()
    assert "Traceback" in printed and f"error: {missing}: no such recipe" in printed


def test_the_command_needs_only_the_standard_library_to_start():
    """A login node has no torch: only a command that runs may import more."""
    program = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in {*sys.stdlib_module_names, "rondo"}:
            raise ImportError(f"imported {name}")

sys.meta_path.insert(0, Refuse())
from rondo.launch.cli import _COMMANDS, main
assert main(["--help"]) == 0 and main(["nope"]) == 2
extra = {name.partition(".")[0] for name in sys.modules} - {"rondo", *sys.stdlib_module_names}
assert not {"torch", "yaml", "numpy", "jsonargparse"} & extra, extra
"""
    done = start("-c", program)
    assert done.returncode == 0, done.stderr


def test_files_that_are_missing_or_forbidden_are_bad_input(capsys):
    def read() -> int:
        raise FileNotFoundError(2, "No such file or directory", "corpus.txt")

    assert run_command(read) == 2
    assert "No such file or directory: 'corpus.txt'" in capsys.readouterr().err


def test_a_missing_package_is_named_with_the_command_that_adds_it(capsys):
    def need(module: str) -> int:
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)

    assert run_command(lambda: need("transformers.models")) == 2
    err = capsys.readouterr().err
    assert "'transformers' is not installed" in err and "extra 'hf'" in err
    assert "pip install transformers" in err
    assert run_command(lambda: need("megatron.core")) == 2
    assert "pip install megatron-core" in capsys.readouterr().err
    with pytest.raises(ModuleNotFoundError):  # a bug of ours
        run_command(lambda: need("rondo.nothing"))


def test_ctrl_c_is_130_without_a_traceback(capsys):
    def interrupted() -> int:
        raise KeyboardInterrupt

    assert run_command(interrupted) == 130
    assert capsys.readouterr().err == "rondo: interrupted\n"


def test_bugs_keep_their_traceback():
    with pytest.raises(ZeroDivisionError):
        run_command(lambda: 1 // 0)


@dataclass
class Clock:
    slept: float = 0.0

    def sleep(self, seconds: float) -> None:
        self.slept += seconds


def test_other_ranks_let_rank_0_speak_first(capsys, monkeypatch):
    def refuse() -> int:
        raise UserError("no")

    clock = Clock()
    monkeypatch.setattr(errors, "time", clock)
    monkeypatch.setenv("RANK", "0")
    assert run_command(refuse) == 2 and clock.slept == 0
    assert capsys.readouterr().err == "rondo: error: no\n"
    monkeypatch.setenv("RANK", "3")
    assert run_command(refuse) == 2 and clock.slept > 1
    assert capsys.readouterr().err == "rondo: rank 3: error: no\n"


def test_under_torchrun_a_bad_recipe_is_told_once(tmp_path):
    """Before any process group starts: no rank waits for another."""
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    recipe = tmp_path / "bad.yaml"
    recipe.write_text("name: bad\nsteps: 0\ndata: {global_batch_size: 5, micro_batch_size: 1}")
    done = start(*words, "-m", "rondo.pretrain", str(recipe), OMP_NUM_THREADS="1")
    assert done.returncode != 0
    assert done.stderr.count("steps: must be at least 1") == 1
    assert done.stderr.count("5 sequences do not divide over 2 data-parallel ranks") == 1
    assert re.search(r"exitcode\s*: 2", done.stderr)
