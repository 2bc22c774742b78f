"""Where the time of a run went: what is made of its records."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from rondo.goodput import ATTEMPTS, LOST, read_goodput

pytestmark = pytest.mark.quick

EVENTS = [
    {"time": 1000, "event": "start"},
    {"time": 1055, "event": "failure"},
    {"time": 1075.6, "event": "end", "outcome": "interrupted"},
    {"time": 1175.5, "event": "start"},
    {"time": 1196.1, "event": "end", "outcome": "done"},
]


def row(step: int, time: float, seconds: float, **held: float) -> dict[str, Any]:
    more = {f"{kind}_seconds": value for kind, value in held.items()}
    return {"step": step, "loss": 2.5, "seconds": seconds, "time": time, **more}


REDONE = [row(3, 1052, 2, save=1), row(4, 1054, 2)]
RECORDS = [
    {"event": "start", "time": 1010, "step": 0, "redone": []},
    {"event": "start", "time": 1056, "step": 3, "redone": REDONE},
    {"event": "end", "time": 1075.5, "save_seconds": 2, "observe_seconds": 0},
    {"event": "start", "time": 1180, "step": 5, "redone": []},
    {"event": "end", "time": 1196, "save_seconds": 1, "eval_seconds": 0.25},
]
KEPT = [
    row(0, 1045, 12, observe=3),
    row(1, 1047, 2),
    row(2, 1049, 2),
    row(3, 1070, 5),
    row(4, 1073.25, 2.5, observe=0.5, eval=0.25),
    row(5, 1192, 2),
    row(6, 1194.5, 2),
]


def write(run: Path, rows: list, records: list = (), events: list = ()) -> Path:
    (run / "launch").mkdir(parents=True, exist_ok=True)
    files = {"metrics.jsonl": rows, ATTEMPTS: records, "launch/events.jsonl": events}
    for name, lines in files.items():
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (run / name).write_text(text + '{"step": 99, "seconds": 3.0, "event": "sta')  # torn
    os.utime(run / "metrics.jsonl", (1194.5, 1194.5))
    return run


def test_a_crash_and_a_requeue(tmp_path: Path) -> None:
    """Killed 1 s into step 5, from a checkpoint after step 2; then told to stop after step 4."""
    found = read_goodput(write(tmp_path, KEPT, RECORDS, EVENTS))
    assert found is not None
    assert (found.wall, found.kept) == (196, 7 * 2)
    assert found.share == 14 / 196
    assert found.lost == pytest.approx(
        {
            "start-up": 30 + 10 + 14.5,
            "compile and autotune": 10 + 3,
            "save stalls": 1 + 2 + 1,
            "evaluation stalls": 3 + 0.75 + 0.25,
            "redone steps": 2 + 2 + 1 + 0.25,
            "idle between jobs": 100,
            "slower steps and the rest": 0.5 + 0.5 + 0.25,
        }
    )
    assert tuple(found.lost) == LOST
    assert found.kept + sum(found.lost.values()) == pytest.approx(found.wall)


def test_without_a_launcher(tmp_path: Path) -> None:
    """Nobody says when the first start died, nor when a process was asked for."""
    found = read_goodput(write(tmp_path, KEPT, RECORDS))
    assert found is not None and found.wall == 186
    assert found.lost["start-up"] == 20 + 9 + 10
    assert found.lost["redone steps"] == 4 + 0.25
    assert found.lost["idle between jobs"] == 2 + 104.5
    assert found.kept + sum(found.lost.values()) == pytest.approx(found.wall)


def test_a_first_step_that_is_done_again_has_compiled(tmp_path: Path) -> None:
    """The second start was killed before it dropped the rows, so the third notes them too."""
    again = [row(0, 1045, 12), row(1, 1047, 2)]
    records = [
        {"event": "start", "time": 1000, "step": 0, "redone": []},
        {"event": "start", "time": 1050, "step": 0, "redone": again},
        {"event": "start", "time": 1060, "step": 0, "redone": again},
    ]
    found = read_goodput(write(tmp_path, [row(0, 1072, 2), row(1, 1074, 2)], records))
    assert found is not None and (found.wall, found.kept) == (74, 4)
    assert found.lost["compile and autotune"] == 10
    assert found.lost["redone steps"] == 4
    assert found.lost["start-up"] == 33 + 10
    assert found.lost["idle between jobs"] == 3 + 10


def test_an_older_run_gives_what_it_can(tmp_path: Path) -> None:
    rows = [{"step": n, "seconds": 2.0, "eval_seconds": 0.5} for n in range(6)]
    found = read_goodput(write(tmp_path, rows, events=EVENTS))
    assert found is not None and (found.wall, found.kept) == (194.5, 12)
    assert found.lost == {**dict.fromkeys(LOST, 0), "evaluation stalls": 3, LOST[-1]: 179.5}
    assert read_goodput(write(tmp_path, rows)) is None  # when it began is not known


def test_an_older_run_that_goes_on(tmp_path: Path) -> None:
    """What came before the first note is in the rest, as far as it did not count."""
    rows = [{"step": n, "seconds": 2.0} for n in range(5)] + KEPT[5:]
    found = read_goodput(write(tmp_path, rows, RECORDS[3:], EVENTS))
    assert found is not None and (found.wall, found.kept) == (196, 14)
    assert (found.lost["start-up"], found.lost["idle between jobs"]) == (14.5, 0)
    assert found.kept + sum(found.lost.values()) == pytest.approx(196)
    rows[:5] = [{**row, "seconds": 9.0} for row in rows[:5]]
    found = read_goodput(write(tmp_path, rows, RECORDS[3:]))  # without a launcher
    assert found is not None and (found.wall, found.kept) == (16, 4)


def test_the_median_counts_no_more_than_steps_took(tmp_path: Path) -> None:
    records = [{"event": "start", "time": 1000, "step": 0, "redone": []}]
    rows = [row(0, 1012, 2), row(1, 1014, 2), row(2, 1014.5, 0.5)]
    found = read_goodput(write(tmp_path, rows, records))
    assert found is not None and (found.wall, found.kept) == (14.5, 4.5)


def test_a_clock_that_is_set_back(tmp_path: Path) -> None:
    records = [{"event": "start", "time": 1000, "step": 0, "redone": []}]
    rows = [row(0, 1012, 2), row(1, 1001, 2), row(2, 1003, 2)]
    found = read_goodput(write(tmp_path, rows, records))
    assert found is not None and found.share <= 1
    assert found.kept + sum(found.lost.values()) == pytest.approx(found.wall)


def test_a_run_without_steps(tmp_path: Path) -> None:
    assert read_goodput(write(tmp_path, [], RECORDS[:1], EVENTS[:1])) is None
    assert read_goodput(tmp_path / "nowhere") is None
