"""`make gpu` up to where it needs a GPU: which interpreter it takes, what it runs, and that this
needs no packages but those it says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
MODULES = re.findall(r"-m (rondo\.[\w.]+)", (HERE / "run.sh").read_text())


def interpreter(folder: Path, name: str, *, gpu: bool, lacks: str = "", tests: int = 0) -> Path:
    """A stand-in that writes down what it is to run; the tests end with the code `tests`."""
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(
        f"#!/bin/sh\n"
        f'[ "$1" = -c ] && {{ echo {lacks}; exit {int(not gpu)}; }}\n'
        f'echo "{name} $*" >> {folder}/log\n'
        f'[ "$2" = pytest ] && exit {tests}\nexit 0\n'
    )
    path.chmod(0o755)
    return path


def run(folder: Path, python: Path | str) -> tuple[int, str, list[str]]:
    """Exit code, what was said, and what was run."""
    environment = {**os.environ, "PYTHON": str(python), "BIN": str(folder / "bin")}
    done = subprocess.run(
        ["sh", str(HERE / "run.sh")], env=environment, capture_output=True, text=True, timeout=60
    )
    log = folder / "log"
    return (
        done.returncode,
        done.stdout + done.stderr,
        log.read_text().split("\n")[:-1] if log.exists() else [],
    )


@pytest.mark.quick
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    interpreter(tmp_path, "bin/python", gpu=False)
    for python in ("not-there", interpreter(tmp_path, "plain", gpu=False)):
        code, said, ran = run(tmp_path, python)
        assert (code, ran) == (0, [])
        assert said == "make gpu: no CUDA device here; nothing was run\n"


@pytest.mark.quick
@pytest.mark.parametrize(("own", "taken"), [(True, "plain"), (False, "bin/python")])
def test_it_takes_the_interpreter_that_sees_a_gpu(tmp_path: Path, own: bool, taken: str) -> None:
    interpreter(tmp_path, "bin/python", gpu=True)
    code, _, ran = run(tmp_path, interpreter(tmp_path, "plain", gpu=own))
    assert code == 0
    assert ran[0].startswith(f"{taken} -m pytest tests/gpu tests/kernels/test_triton_compile.py ")
    seconds = [
        int(re.fullmatch(rf"{taken} -m {m} --seconds (\d+)", line)[1])
        for m, line in zip(MODULES, ran[1:], strict=True)
    ]
    assert seconds == [pytest.approx(280, abs=5), pytest.approx(410, abs=5)]


@pytest.mark.quick
def test_a_failed_test_fails_it_after_the_timings(tmp_path: Path) -> None:
    code, _, ran = run(tmp_path, interpreter(tmp_path, "plain", gpu=True, tests=3))
    assert (code, len(ran)) == (3, 3)


@pytest.mark.quick
def test_it_names_packages_that_are_missing(tmp_path: Path) -> None:
    code, said, ran = run(tmp_path, interpreter(tmp_path, "plain", gpu=True, lacks="pytest yaml"))
    assert (code, ran) == (1, [])
    assert f"{tmp_path}/plain sees one but lacks: pytest yaml." in said
    interpreter(tmp_path, "bin/python", gpu=True)
    code, _, ran = run(tmp_path, tmp_path / "plain")
    assert code == 0 and {line.split()[0] for line in ran} == {"bin/python"}


def bare(code: str) -> str:
    """What `code` prints where nothing else is installed than torch, triton, numpy and pytest."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT / ".typing"), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    command = [sys.executable, str(HERE / "bare.py"), code]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def test_kernels_models_and_their_timings_need_nothing_else() -> None:
    code = """
import importlib, importlib.util, pkgutil, sys
from rondo import kernels, models
assert importlib.util.find_spec("yaml") is None
for package in (kernels, models):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if ".hf." not in module.name + "." and not module.name.endswith("__main__"):
            importlib.import_module(module.name)
sys.argv = ["bench", "--help"]
importlib.import_module("rondo.kernels.bench.__main__").main()
"""
    assert "usage: python -m rondo.kernels.bench" in bare(code)


@pytest.mark.slow
def test_the_tests_need_nothing_else() -> None:
    code = """
import glob, pytest, sys
files = glob.glob("tests/kernels/test_triton_*.py")
given = ["tests/gpu", *files, "tests/kernels/test_expert_rows.py"]
sys.exit(pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", *given]))
"""
    assert "tests/gpu/test_cuda.py" in bare(code)


@pytest.mark.slow
@pytest.mark.parametrize("module", MODULES)
def test_what_it_runs_has_a_help(module: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", module, "--help"],
        env={**os.environ, "PYTHONPATH": str(ROOT / ".typing")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "--seconds" in done.stdout
