"""Ranks on this machine: their exit codes, logs and signals, alone and under torchrun."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from rondo.launch import ranks
from rondo.launch.folder import RunFolder
from rondo.launch.ranks import LocalRanks, TorchrunRanks, free_port
from rondo.launch.supervise import Ranks
from rondo.launch.worker import put

ROOT = Path(__file__).parents[2]
SMALL = ["--model.dim=32", "--data.sequence_length=64", "--data.micro_batch_size=2"]
SMALL += ["--checkpoint.every=4", "--steps=16", "--evals.batches=0", "--logging.tensorboard=false"]
SMALL += ["--model.num_layers=2", "--model.pattern=[gated_deltanet,attention]"]
HEAD = "import os, signal, sys, time; rank = int(os.environ['RANK'])\n"
LISTEN = """
def end(*_):
    time.sleep(2 * rank)
    sys.exit(75)
signal.signal(signal.SIGTERM, end)
print("ready", flush=True)
"""


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT / ".typing"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def local(program: str, logs: Path) -> LocalRanks:
    return LocalRanks(["rondo.tests.launch.fake_rank", HEAD + program], 2, logs, {"A": "b c"})


def under_torchrun(program: str, logs: Path) -> TorchrunRanks:
    command = ["rondo.tests.launch.fake_rank", HEAD + program]
    return TorchrunRanks(["--standalone", "--nproc-per-node=2"], command, logs, {"A": "b c"})


BOTH = pytest.mark.parametrize("start", [local, under_torchrun])


def wait(what: str, ready: Callable[[], object]) -> object:
    deadline = time.monotonic() + 90
    while not (found := ready()):
        assert time.monotonic() < deadline, f"no {what} in time"
        time.sleep(0.02)
    return found


def end(started: Ranks) -> int:
    codes: list[int] = []
    wait("end", lambda: codes.extend(c for c in [started.poll()] if c is not None) or codes)
    return codes[0]


def logs_say(folder: Path, text: str) -> bool:
    logs = [folder / f"rank-00{rank}.log" for rank in (0, 1)]
    return all(log.exists() and text in log.read_text() for log in logs)


@BOTH
def test_asked_to_stop_all_ranks_end_in_their_own_time(start, tmp_path: Path) -> None:
    """One takes longer: it is not ended because the other has."""
    started = start(LISTEN + "time.sleep(99)", tmp_path)
    wait("start", lambda: logs_say(tmp_path, "ready"))
    began = time.monotonic()
    started.stop()
    assert end(started) == 75
    assert time.monotonic() - began > 1.5


@BOTH
@pytest.mark.parametrize(
    ("program", "codes"),
    [
        ("print(os.environ['A'], rank, 'of', os.environ['WORLD_SIZE'])", {0}),
        ("sys.exit(2)", {2}),
        ("1 / 0", {1}),
        ("os.kill(os.getpid(), 9) if rank else time.sleep(99)", {137, 1}),
    ],
)
def test_exit_codes(start, program: str, codes: set[int], tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(ranks, "LAST_WORDS_SECONDS", 0.5)
    assert end(start(program, tmp_path)) in codes
    if codes == {0}:
        assert (tmp_path / "rank-001.log").read_text() == "b c 1 of 2\n"
        assert (tmp_path / "rank-000.log").read_text() == "b c 0 of 2\n"
    if program == "1 / 0":  # torchrun may end a rank before it comes to that
        assert any("ZeroDivisionError" in log.read_text() for log in tmp_path.glob("*.log"))


def test_a_code_that_was_not_written_whole_is_not_there(tmp_path: Path, monkeypatch) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "replace", killed)
        put(tmp_path / "0.code", 1)
    assert [*tmp_path.glob("*.code")] == []
    put(tmp_path / "0.code", 75)
    assert (tmp_path / "0.code").read_text() == "75"
    assert [path.name for path in tmp_path.iterdir()] == ["0.code"]


def test_a_free_port_is_none_that_connections_get() -> None:
    ports = {free_port() for _ in range(20)}
    assert len(ports) > 1 and max(ports) < 32768
    for port in ports:
        with socket.socket() as server:
            server.bind(("", port))


@BOTH
def test_ranks_die_with_their_launcher(start, tmp_path: Path) -> None:
    """Its lock does not hold from then on, so they must not write any more."""
    program = f"""
import time
from pathlib import Path
from rondo.tests.launch.test_local import {start.__name__}, LISTEN
started = {start.__name__}(LISTEN + "time.sleep(99)", Path({str(tmp_path)!r}))
time.sleep(99)
"""
    launcher = subprocess.Popen([sys.executable, "-c", program])
    try:
        wait("start", lambda: logs_say(tmp_path, "ready"))
        children = psutil.Process(launcher.pid).children(recursive=True)
        assert len([each for each in children if each.name() != "tee"]) >= 2
    finally:
        launcher.kill()
        launcher.wait()
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive


def launch(
    folder: Path, kind: str, *options: str, python: str = sys.executable
) -> subprocess.Popen[str]:
    words = [kind, "tiny", *(options or ["--processes=2"])]
    words += ["--", *SMALL, f"--data.folder={folder.parent}/data"]
    return subprocess.Popen(
        [python, "-m", "rondo.launch.cli", "launch", *words],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str], code: int) -> str:
    output, _ = process.communicate(timeout=120)
    assert process.returncode == code, output
    return output


def losses(folder: Path) -> list[tuple[int, float]]:
    path = folder / "runs" / "tiny" / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [(row["step"], row["loss"]) for row in map(json.loads, lines)]


@pytest.mark.slow
def test_stopped_and_gone_on_a_run_ends_as_if_nothing_had_been(tmp_path: Path) -> None:
    """Stopped under torchrun, as on two machines, by the signal that torchrun passes on to nobody;
    gone on without it."""
    straight, other = tmp_path / "straight", tmp_path / "other"
    straight.mkdir()
    other.mkdir()
    finish(launch(straight, "local"), 0)

    meet = ["--nodes=2", f"--master=127.0.0.1:{free_port()}", "--processes=1"]
    first, second = (launch(other, "torchrun", *meet, f"--node-rank={k}") for k in (0, 1))
    wait("steps", lambda: len(losses(other)) >= 5)
    second.send_signal(signal.SIGUSR1)
    assert "SIGUSR1: asking the ranks to stop" in finish(second, 75)
    assert "interrupted" in finish(first, 75)
    assert 5 <= len(losses(other)) < 16

    process = launch(other, "local")
    count = len(losses(other))
    wait("steps", lambda: len(losses(other)) >= count + 2)
    workers = psutil.Process(process.pid).children()
    for worker in workers:
        worker.suspend()
    refused = finish(launch(other, "local", python=sys._base_executable), 2)
    assert f"lock is held by process {process.pid} on " in refused
    stop = [sys._base_executable, "-m", "rondo.launch.cli", "stop", "tiny"]
    subprocess.run(stop, cwd=other, check=True, capture_output=True)
    for worker in workers:
        worker.resume()
    assert "stopped: asked to stop" in finish(process, 75)

    output = finish(launch(other, "local"), 0)
    assert "going on after step" in output and re.search(r"step 16/16", output)
    assert losses(other) == losses(straight)
    folder = RunFolder(other / "runs" / "tiny")
    outcomes = [row["outcome"] for row in folder.events("end")]
    assert outcomes == ["interrupted", "interrupted", "stopped", "done"]
    assert sorted(path.name for path in (folder.launch / "logs").iterdir()) == [
        *("local.0", "local.1", "torchrun-0.0", "torchrun-1.0"),
    ]
    assert not (folder.launch / "lock").exists()


def test_a_dry_run_prints_what_would_run_and_does_nothing(tmp_path: Path) -> None:
    for kind, count in (("local", 2), ("torchrun", 1)):
        words = [kind, "tiny", "--processes=2", "--dry-run", "--env=A=b c", "--", "--steps", "5"]
        done = subprocess.run(
            [sys._base_executable, "-m", "rondo.launch.cli", "launch", *words],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
        )
        lines = done.stdout.splitlines()
        assert len(lines) == count
        assert all("A='b c'" in line and line.endswith(" tiny --steps 5") for line in lines)
    assert list(tmp_path.iterdir()) == []
