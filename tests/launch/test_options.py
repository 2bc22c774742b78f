"""The command lines of launch, status and stop: what they say to mistakes, and their help."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from rondo.errors import UserError
from rondo.launch.cli import main
from rondo.launch.options import parse_launch
from rondo.launch.start import run_folder

pytestmark = pytest.mark.quick
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["slrum", "tiny"], "got 'slrum'; did you mean slurm?"),
        (["slurm"], "required: RECIPE"),
        (["slurm", "tiny", "--nodse", "2"], "unrecognized arguments: --nodse 2; did you mean --no"),
        (["slurm", "tiny", "--partiton=a"], "--partiton=a; did you mean --partition?"),
        (["slurm", "tiny", "--nodes", "0"], "expected a number of at least 1, got '0'"),
        (["slurm", "tiny", "--time", "a day"], "--time: expected minutes"),
        (["slurm", "tiny", "--env", "1A=b"], "--env: expected KEY=VALUE, got '1A=b'"),
        (["slurm", "tiny", "--runtime", "docker"], "invalid choice: 'docker'"),
        (["local", "tiny", "--nodes", "2"], "unrecognized arguments: --nodes 2"),
        (["torchrun", "tiny", "--master", "host"], "--master: expected HOST:PORT, got 'host'"),
        (["torchrun", "tiny", "--nodes", "2"], "--nodes 2 needs --master HOST:PORT"),
        (["torchrun", "tiny", "--node-rank", "1"], "--node-rank 1: there are 1 machine(s)"),
        (["local", "tiny", "--", "--step", "3"], "step: unknown key"),
        (["local", "tiny", "--processes", "3"], "do not divide over 3 data-parallel ranks"),
        (["slurm", "nowhere.yaml"], "nowhere.yaml: no such recipe file"),
        (["slurm", "tiny", "--dry-run", "--sbatch=a\nb"], "is not one line of text"),
    ],
)
def test_bad_input_is_one_message(words: list[str], message: str, capsys) -> None:
    assert main(["launch", *words]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("rondo: error: ") and message in err
    assert out == "" and "Traceback" not in err


def test_status_and_stop_of_what_is_not_there(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["status"]) == 2
    assert "runs: no such folder of runs" in capsys.readouterr().err
    (tmp_path / "runs" / "a" / "checkpoints").mkdir(parents=True)
    assert main(["status"]) == 0
    assert capsys.readouterr().out == "no runs in runs\n"
    assert main(["stop", "b"]) == 2
    assert "no run folder 'b' (under runs/: none)" in capsys.readouterr().err
    (tmp_path / "runs" / "a" / "metrics.jsonl").touch()
    assert main(["stop", "a"]) == 2
    assert "no launcher runs it and no job waits for it" in capsys.readouterr().err


def test_help(capsys) -> None:
    for words in ([], ["--help"]):
        assert main(["launch", *words]) == 0
        text = capsys.readouterr().out
        assert all(f"\n  {kind} " in text for kind in ("local", "torchrun", "slurm"))
    for kind, option in (("local", "--processes"), ("torchrun", "--master"), ("slurm", "--chain")):
        assert main(["launch", kind, "--help"]) == 0
        text = capsys.readouterr().out
        assert f"usage: rondo launch {kind} RECIPE" in text and f"  {option} " in text
    for command in ("status", "stop"):
        assert main([command, "--help"]) == 0
        assert f"usage: rondo {command}" in capsys.readouterr().out


def test_words_behind_two_dashes_are_the_recipes() -> None:
    words = ["slurm", "tiny", "--nodes=2", "--", "--steps", "5", "--", "--a=b"]
    options, overrides = parse_launch(words)
    assert options.kind == "slurm" and options.nodes == 2
    assert overrides == ["--steps", "5", "--", "--a=b"]


@pytest.mark.parametrize(
    ("text", "overrides", "folder"),
    [
        ("name: a", [], "runs/a"),
        ("name: 'a b'   # said\noutput_dir: /x\nmodel: {name: c}\n", [], "/x/a b"),
        ('name: "a#b"\n', [], "runs/a#b"),
        ("steps: 3\nmodel:\n  name: c\n", ["--name", "d"], "runs/d"),
        ("name: a", ["--name=b", "--output_dir", "/o", "--name", "c"], "/o/c"),
    ],
)
def test_the_run_folder_is_found_without_yaml(
    text: str, overrides: list[str], folder: str, tmp_path: Path
) -> None:
    path = tmp_path / "my.yaml"
    path.write_text(text)
    assert run_folder(str(path), overrides) == Path(folder)


def test_a_recipe_without_a_name(tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    path.write_text("steps: 3\nmodel:\n  name: c\n")
    with pytest.raises(UserError, match="name: required key is missing"):
        run_folder(str(path), [])


def test_a_login_node_needs_only_the_standard_library(tmp_path: Path) -> None:
    program = """
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name: None if name in ("torch", "yaml") else find(name)
from rondo.launch.cli import main
assert main(["launch", "slurm", "tiny", "--nodes", "2", "--dry-run"]) == 0
assert main(["launch", "slurm", "--help"]) == 0
import os; os.mkdir("runs"); assert main(["status"]) == 0
extra = {name.partition(".")[0] for name in sys.modules} - {"rondo", *sys.stdlib_module_names}
assert not {name for name in extra if not name.startswith("_")}, extra
"""
    words = [sys.executable, "-S", "-c", program]
    environment = {"PYTHONPATH": str(ROOT / ".typing"), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "the recipe is not checked: no torch and no yaml here" in done.stderr
    assert re.search(r"^#SBATCH --nodes=2$", done.stdout, re.MULTILINE)
    assert not (tmp_path / "runs" / "tiny").exists()
