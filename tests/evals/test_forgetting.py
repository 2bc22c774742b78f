"""The forgetting matrix: worked values, and what the command leaves."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import pytest

from rondo.errors import UserError
from rondo.evals.forgetting import report
from rondo.launch.cli import main

pytestmark = pytest.mark.quick
STAGES = [("one", "one"), ("two", "two"), ("again", "one")]


def write(folder: Path, losses: list[dict[str, float]], runs: tuple[str, ...] = ()) -> Path:
    """A run of three stages of 4 steps, validated before, and after every 2 steps."""
    folder.mkdir()
    stages = [
        {"name": name, "start": 4 * i, "steps": 4, "domain": domain, "sources": []}
        for i, (name, domain) in enumerate(STAGES)
    ]
    plan = {"steps": 12, "replayed_runs": list(runs), "stages": stages}
    (folder / "stages.json").write_text(json.dumps(plan))
    first, *later = losses
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(2 * len(later)):
            row: dict[str, float] = {"step": step, "loss": 1.0}
            if step == 0:
                row |= values("validation_before", first)
            if step % 2:
                row |= values("validation", later[step // 2])
            file.write(json.dumps(row) + "\n")
    return folder


def values(prefix: str, losses: dict[str, float]) -> dict[str, float]:
    found = {f"{prefix}/loss": 0.0}
    for name, loss in losses.items():
        found |= {f"{prefix}/{name}/loss": loss, f"{prefix}/{name}/bits_per_byte": 2 * loss}
    return found


WORKED = [
    {"one": 9.0, "two": 8.0},
    {"one": 5.0, "two": 7.0}, {"one": 3.0, "two": 6.0},
    {"one": 4.0, "two": 4.0}, {"one": 4.5, "two": 2.0},
    {"one": 3.0, "two": 2.5}, {"one": 2.75, "two": 2.25},
]  # fmt: skip


def test_worked_matrix(tmp_path: Path) -> None:
    [found] = report([write(tmp_path / "run", WORKED)])
    assert found["domains"] == ["one", "two"] and found["stages"] == ["one", "two", "again"]
    assert found["after_steps"] == [4, 8, 12] and found["finished"] == [True] * 3
    assert found["loss"]["before"] == [9.0, 8.0]
    assert found["loss"]["matrix"] == [[3.0, 6.0], [4.5, 2.0], [2.75, 2.25]]
    assert found["loss"]["forgetting"] == [[None, None], [1.5, None], [None, 0.25]]
    assert found["loss"]["adaptation"] == [3.0, 2.0, 2.75]
    assert found["bits_per_byte"]["forgetting"][1] == [3.0, None]
    assert json.loads((tmp_path / "run/forgetting.json").read_text()) == found


def test_a_run_that_is_replayed_was_left_before_the_first_step(tmp_path: Path) -> None:
    losses = [{**row, "base": 1.0 + n} for n, row in enumerate(WORKED)]
    [found] = report([write(tmp_path / "run", losses, ("base",))])
    assert [row[2] for row in found["loss"]["forgetting"]] == [2.0, 4.0, 6.0]


def test_a_run_that_is_not_done_is_told_as_far_as_it_is(tmp_path: Path) -> None:
    [found] = report([write(tmp_path / "run", WORKED[:4])])
    assert found["stages"] == ["one", "two"] and found["finished"] == [True, False]
    assert found["loss"]["forgetting"][1] == [1.0, None]


def test_the_command_compares_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = write(tmp_path / "first", WORKED), write(tmp_path / "second", WORKED[:5])
    (first / "tensorboard").mkdir()
    assert main(["forgetting", str(first), str(second), "--html", str(tmp_path / "all.html")]) == 0
    text = capsys.readouterr().out
    assert "9.0000 (+3.0000)" in text and "second: bits per byte" in text
    page = (tmp_path / "all.html").read_text()
    assert page.count("<polyline") == 4 and "second: two" in page
    assert list((first / "tensorboard").iterdir())
    assert main(["forgetting", "--help"]) == 0


def cells(folder: Path, rows: int, columns: int) -> list[list[set[int]]]:
    """The greys in each cell of the picture that TensorBoard shows of a matrix."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    [event] = EventAccumulator(str(folder / "tensorboard")).Reload().Images("forgetting/matrix")
    assert event.step == 11 and (event.width, event.height) == (32 * columns, 32 * rows)
    data = event.encoded_image_string
    start = data.index(b"IDAT")
    length = int.from_bytes(data[start - 4 : start], "big")
    pixels = zlib.decompress(data[start + 4 : start + 4 + length])
    width = 1 + event.width  # each line begins with its filter, which is none
    lines = [pixels[i + 1 : i + width] for i in range(0, len(pixels), width)]
    return [
        [
            set(b"".join(line[x : x + 32] for line in lines[y : y + 32]))
            for x in range(0, width - 1, 32)
        ]
        for y in range(0, event.height, 32)
    ]


def test_tensorboard_shows_what_was_measured_and_what_was_not(tmp_path: Path) -> None:
    """A stage that was added later: its text was not looked at before."""
    losses = [{**row} for row in WORKED]
    for row in losses[:3]:
        del row["two"]
    folder = write(tmp_path / "run", losses)
    (folder / "tensorboard").mkdir()
    [found] = report([folder])
    matrix = [[3.0, None], [4.5, 2.0], [2.75, 2.25]]
    assert found["loss"]["matrix"] == matrix
    for shown, wanted in zip(cells(folder, 3, 2), matrix, strict=True):
        for greys, loss in zip(shown, wanted, strict=True):
            assert greys == ({0, 255} if loss is None else {255 - round(255 * loss / 4.5)})


def test_runs_without_stages_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"it has no stages\.json"):
        report([tmp_path])
    with pytest.raises(UserError, match="nothing was validated yet"):
        report([write(tmp_path / "run", WORKED[:1])])
