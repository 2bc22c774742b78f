"""`make gpu` up to where it needs a GPU: which interpreter it takes, what it runs, and that this
needs no packages but those it says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
MODULES = ("rondo.kernels.bench", "rondo.pretrain.bench_presets")
COMPILING = f"-m {MODULES[0]} --compile"


def interpreter(
    folder: Path,
    name: str,
    *,
    gpu: bool,
    lacks: str = "",
    yaml: bool = True,
    fails: str = "",
    code: int = 0,
) -> Path:
    """A stand-in that writes down what it is to run; arguments with `fails` in them end with the
    code."""
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(
        f"#!/bin/sh\n"
        f'[ "$2" = "import yaml" ] && exit {int(not yaml)}\n'
        f'[ "$1" = -c ] && {{ echo {lacks}; exit {int(not gpu)}; }}\n'
        f'echo "{name} $*" >> {folder}/log\n'
        f'echo "${{FLA_CACHE_RESULTS-unset}} $*" >> {folder}/tuning\n'
        f'case "$*" in {fails or "nothing"}*) echo "said by {fails}"; exit {code};; esac\nexit 0\n'
    )
    path.chmod(0o755)
    return path


def run(folder: Path, python: Path | str) -> tuple[int, str, list[str]]:
    """Exit code, what was said, and what was run."""
    environment = {**os.environ, "PYTHON": str(python), "BIN": str(folder / "bin")}
    environment.pop("FLA_CACHE_RESULTS", None)
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
    assert {line.split()[0] for line in ran} == {taken}
    compiling = [line for line in ran[:-2] if COMPILING in line]
    # 170 seconds, less what the start took.
    timed = re.compile(rf"{taken} tests/gpu/until.py 1(70|6\d) ")
    tests = [timed.sub("", line) for line in ran[:-2] if timed.match(line)]
    assert len(tests) == 10 and len(compiling) == 1 and len(ran) == 13
    mixers = sorted(line for line in tests if "--share" in line)
    shares = [f"--share={part}/4 tests/gpu/test_mixers.py" for part in (1, 2, 3, 4)]
    assert mixers == [f"{share} -k not delta" for share in shares]
    # Each file twice: without the delta rule, and the delta rule in processes of its own.
    with_it, without = (
        {file for line in tests if line.endswith(end) for file in line.split() if "/test_" in file}
        for end in (" -k delta", " -k not delta")
    )
    files = with_it | without
    assert without - with_it == {"tests/gpu/test_attention.py"} and not with_it - without
    wanted = [*HERE.glob("test_*.py"), *(ROOT / "tests/kernels").glob("test_triton_*.py")]
    wanted += [ROOT / "tests/kernels/test_expert_rows.py"]
    no_device = {"test_run.py", "test_limits.py"}
    no_device |= {"test_triton_compile.py", "test_triton_code.py"}
    assert sorted(ROOT / file for file in files) == sorted(
        path for path in wanted if path.name not in no_device
    )
    # Timings come after, with what is left of 480 seconds.
    seconds = [
        int(re.fullmatch(rf"{taken} -m {module}.* --seconds (\d+)", line)[1])
        for module, line in zip(MODULES, ran[-2:], strict=True)
    ]
    assert seconds == [pytest.approx(365, abs=5), pytest.approx(466, abs=5)]


@pytest.mark.quick
def test_what_fla_tunes_beside_the_tests_is_not_kept(tmp_path: Path) -> None:
    run(tmp_path, interpreter(tmp_path, "plain", gpu=True))
    told = (tmp_path / "tuning").read_text().splitlines()
    assert next(line for line in told if COMPILING in line).startswith("0 ")
    timed = [line for line in told if f"-m {MODULES[0]} --seconds" in line]
    assert len(timed) == 1 and timed[0].startswith("unset ")


@pytest.mark.quick
@pytest.mark.parametrize(
    "fails", ["tests/gpu/until.py*mixers", f"-m?{MODULES[0]}?--sec", f"-m?{MODULES[1]}"]
)
def test_what_fails_keeps_nothing_from_running(tmp_path: Path, fails: str) -> None:
    python = interpreter(tmp_path, "plain", gpu=True, fails=fails, code=3)
    code, said, ran = run(tmp_path, python)
    assert (code, len(ran)) == (1, 13)
    assert f"said by {fails}" in said


@pytest.mark.quick
def test_without_yaml_all_but_presets_run(tmp_path: Path) -> None:
    code, said, ran = run(tmp_path, interpreter(tmp_path, "plain", gpu=True, yaml=False))
    assert (code, len(ran)) == (0, 12)
    assert MODULES[0] in ran[-1] and "presets are YAML" in said


@pytest.mark.quick
def test_it_says_which_tests_did_not_end(tmp_path: Path) -> None:
    fails = "tests/gpu/until.py*test_cuda.py?-k?not"
    python = interpreter(tmp_path, "plain", gpu=True, fails=fails, code=2)
    code, said, _ = run(tmp_path, python)
    assert code == 1
    assert said.count("did not end in time") == 1
    assert said.index("tests: operators") < said.index("did not end") < said.index("tests: long")


@pytest.mark.quick
@pytest.mark.parametrize(
    ("slow", "started"), [("tests/gpu/until.py", 10), ("-m?rondo.kernels.bench?--sec", 1)]
)
def test_a_signal_ends_all(tmp_path: Path, slow: str, started: int) -> None:
    python = interpreter(tmp_path, "plain", gpu=True)
    text = python.read_text().replace(
        "exit 0\n", f'case "$*" in {slow}*) echo $$ >> {tmp_path}/pids; exec sleep 50;; esac\n'
    )
    python.write_text(text)
    environment = {**os.environ, "PYTHON": str(python), "BIN": str(tmp_path)}
    running = subprocess.Popen(["sh", str(HERE / "run.sh")], env=environment)
    pids, end = tmp_path / "pids", time.monotonic() + 30
    while not (pids.exists() and len(pids.read_text().splitlines()) == started):
        assert time.monotonic() < end
        time.sleep(0.05)
    time.sleep(0.2)
    running.terminate()
    assert running.wait(timeout=20) == 130
    for pid in pids.read_text().split():
        while Path(f"/proc/{pid}").exists():
            assert time.monotonic() < end, "a process outlives the signal"
            time.sleep(0.05)


@pytest.mark.quick
def test_it_names_packages_that_are_missing(tmp_path: Path) -> None:
    code, said, ran = run(tmp_path, interpreter(tmp_path, "plain", gpu=True, lacks="pytest triton"))
    assert (code, ran) == (1, [])
    assert f"{tmp_path}/plain sees one but lacks: pytest triton." in said
    interpreter(tmp_path, "bin/python", gpu=True)
    code, _, ran = run(tmp_path, tmp_path / "plain")
    assert code == 0 and {line.split()[0] for line in ran} == {"bin/python"}


def until(folder: Path, seconds: int, code: str) -> subprocess.CompletedProcess[str]:
    """A file of tests run by `until.py`."""
    (folder / "test_it.py").write_text(code)
    command = [sys.executable, str(HERE / "until.py"), str(seconds)]
    command += ["--rootdir", str(folder), str(folder / "test_it.py")]
    return subprocess.run(command, capture_output=True, text=True, timeout=50, cwd=folder)


@pytest.mark.slow
def test_tests_are_interrupted_when_their_time_is_up(tmp_path: Path) -> None:
    code = "import time\ndef test_first(): assert False\ndef test_last(): time.sleep(60)\n"
    done = until(tmp_path, 8, code)
    assert done.returncode == 2
    assert "1 failed" in done.stdout and "KeyboardInterrupt" in done.stdout


@pytest.mark.slow
def test_a_hang_that_no_interrupt_ends(tmp_path: Path) -> None:
    """As in a call of a driver; what was found before is there, and where it hung."""
    code = """
import signal, time
def test_first(): assert "it" == "that"
def test_hangs():
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
    time.sleep(60)
"""
    done = until(tmp_path, 4, code)
    assert done.returncode == 1
    assert "FAILED test_it.py::test_first" in done.stderr and "'it' == 'that'" in done.stderr
    assert "Timeout" in done.stderr and "in test_hangs" in done.stderr


@pytest.mark.slow
def test_what_a_failed_test_held_is_free_for_the_next(tmp_path: Path) -> None:
    code = """
import sys, weakref
import torch
given = []
torch.cuda.is_initialized = lambda: True
torch.cuda.empty_cache = lambda: given.append("back")
class Tensor: ...
def test_first():
    held = Tensor()
    sys.seen = weakref.ref(held)
    raise MemoryError
def test_next():
    assert sys.seen() is None and given == ["back"]
"""
    assert "1 failed, 1 passed" in until(tmp_path, 40, code).stdout


@pytest.mark.slow
def test_shares_of_the_mixers_are_all_of_them() -> None:
    """No mixer is in two, and float32, which the kernels take, comes first in each."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / ".typing")}
    every = ["tests/gpu/test_mixers.py", "--collect-only", "-p", "no:cacheprovider"]
    found: list[list[str]] = []
    for share in ([], ["--share=1/2"], ["--share=2/2"]):
        command = [sys.executable, str(HERE / "until.py"), "90", *share, *every]
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        found.append(re.findall(r"\[torch\.(float\d\d-\w+)", done.stdout))
        assert found[-1] == sorted(found[-1], key=lambda test: test[:7])
    whole, *shares = found
    assert sorted(shares[0] + shares[1]) == sorted(whole) and len(set(whole)) > 20
    assert not set(shares[0]) & set(shares[1])


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
given = [*glob.glob("tests/gpu/test_*.py"), *files, "tests/kernels/test_expert_rows.py"]
sys.exit(pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", *given]))
"""
    assert "tests/gpu/test_mixers.py" in bare(code)


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
