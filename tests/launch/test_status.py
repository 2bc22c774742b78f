"""`rondo status` and the health check: what they find out."""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path

import pytest

from rondo.goodput import LOST, Goodput
from rondo.launch import health
from rondo.launch.folder import RunFolder, find_run
from rondo.launch.lock import Lock
from rondo.launch.status import duration, main, read_status, table, time_table

pytestmark = pytest.mark.quick


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """A run of ten steps, of which six are done."""
    path = tmp_path / "runs" / "mine"
    path.mkdir(parents=True)
    (path / "recipe.yaml").write_text("name: mine\nsteps: 10\ndata:\n  steps: 3\n")
    write_rows(path, 6)
    return RunFolder(path)


def write_rows(path: Path, count: int) -> None:
    rows = [
        {"step": step, "loss": 4 - step / 10, "tokens_per_second": 1e4, "seconds": 2.0}
        for step in range(count)
    ]
    torn = '{"step": 99, "lo'
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + torn)


def state(folder: RunFolder, **queue: str) -> str:
    return read_status(folder, queue).state


def test_numbers(folder: RunFolder) -> None:
    now = time.time()
    os.utime(folder.path / "metrics.jsonl", (now - 90, now - 90))
    events = [{"time": now - 190, "event": "start", "launch": "a"}]
    events += [{"time": now - 120, "event": "start", "launch": "a"}]
    folder.launch.mkdir()
    (folder.launch / "events.jsonl").write_text("".join(json.dumps(row) + "\n" for row in events))
    found = read_status(folder, {}, now)
    assert (found.step, found.steps, found.loss) == (6, 10, 3.5)
    assert found.age == pytest.approx(90, abs=1)
    assert found.goodput is not None
    assert found.goodput.share == pytest.approx(6 * 2 / 100, rel=0.01)  # both starts
    header, line = table([found]).splitlines()
    assert " ".join(header.split()) == "run state step loss tokens/s last step goodput scored jobs"
    assert " ".join(line.split()) == "mine dead 6/10 3.5000 10,000 90 s 12.0% - -"


def test_a_single_run_shows_where_the_time_went(folder: RunFolder, capsys, monkeypatch) -> None:
    parts = {**dict.fromkeys(LOST, 0.0), "start-up": 6.0, "idle between jobs": 10800.0}
    shown = time_table(Goodput(wall=21600.0, kept=10794.0, lost=parts))
    assert [" ".join(line.split()) for line in shown.splitlines()] == [
        "6.0 h since the first start time share",
        "steps that count 3.0 h 50.0%",
        "start-up 6 s 0.0%",
        "idle between jobs 3.0 h 50.0%",
    ]
    folder.record("start", launch="a")
    os.utime(folder.path / "metrics.jsonl", (time.time() + 60, time.time() + 60))
    assert main([str(folder.path)]) == 0
    said = capsys.readouterr().out
    assert re.search(r"\n\n60 s since the first start .*\nsteps .* 12 s +20", said)
    assert main([str(folder.path.parent)]) == 0
    assert "since the first start" not in capsys.readouterr().out


def test_states_of_a_launched_run(folder: RunFolder) -> None:
    folder.record("submit", launch="a", jobs=["7", "8"])
    assert state(folder, **{"7": "PENDING"}) == "queued"
    folder.record("start", launch="a", job="7")
    with Lock(folder.launch / "lock"):
        assert state(folder, **{"7": "RUNNING"}) == "running"
    assert state(folder) == "dead"
    for outcome, shown in (("interrupted", "stopped"), ("stopped", "stopped")):
        folder.record("end", launch="a", outcome=outcome)
        assert state(folder) == shown
    folder.record("start", launch="b")
    assert state(folder) == "dead"
    for outcome in ("failed", "done"):
        folder.record("end", launch="b", outcome=outcome)
        assert state(folder) == outcome
    assert folder.outcome("a") == "stopped"
    assert read_status(folder, {"7": "COMPLETING"}).jobs == ("7 COMPLETING",)


def test_states_of_other_runs(folder: RunFolder) -> None:
    assert state(folder) == "running"
    os.utime(folder.path / "metrics.jsonl", (0, 0))
    assert state(folder) == "dead"
    (folder.path / "checkpoints" / "step-000000006").mkdir(parents=True)
    assert state(folder) == "stopped"
    write_rows(folder.path, 10)
    assert state(folder) == "done"
    assert read_status(folder, {}).goodput is None


def test_a_run_that_has_not_begun(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "new")
    folder.record("submit", launch="a", jobs=["7"])
    found = read_status(folder, {"7": "PENDING"})
    assert (found.state, found.step, found.steps, found.loss) == ("queued", 0, None, None)
    assert " ".join(table([found]).splitlines()[1].split()) == "new queued 0/? - - - - - 7 PENDING"


def test_runs_are_found_by_path_and_by_name(folder: RunFolder, monkeypatch) -> None:
    assert find_run(str(folder.path)).path == folder.path
    monkeypatch.chdir(folder.path.parents[1])
    assert find_run("mine").path == Path("runs/mine")


def test_durations() -> None:
    assert [duration(s) for s in (5, 700, 9000, 200_000)] == ["5 s", "12 min", "2.5 h", "2.3 d"]


def test_a_healthy_node(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("SLURMD_NODENAME", "n1")
    assert health.main([f"--folder={tmp_path}", "--memory=0.001"]) == 0
    assert capsys.readouterr().out == "n1\thealthy\n"
    assert list(tmp_path.iterdir()) == []


def test_what_is_wrong_with_a_node_is_named(tmp_path: Path, monkeypatch, capsys) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 0\necho 1\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("SLURMD_NODENAME", "n1")
    words = [f"--folder={tmp_path}/nowhere", "--gpus=8", "--memory=1e6", "--master=no.invalid"]
    assert health.main(words) == 1
    line = capsys.readouterr().out
    assert line.startswith("n1\thost name no.invalid does not resolve")
    assert "of memory free, 1e+06 wanted" in line
    assert "the run folder is not writable" in line
    assert "2 GPU(s), 8 wanted" in line
    tool.write_text("#!/bin/sh\necho 'driver is lost' >&2\nexit 9\n")
    assert health.problems(tmp_path, 1, 0, "localhost") == ["nvidia-smi: driver is lost"]
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert "nvidia-smi" in health.problems(tmp_path, 1, 0, "localhost")[0]
