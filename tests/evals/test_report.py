"""`rondo report`: what it reads of a run and shows of it."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest

from rondo.errors import UserError
from rondo.evals import report_figures as figures
from rondo.evals.report import main, sections
from rondo.evals.report_data import ByPosition, RunData, differences, read_runs

pytestmark = pytest.mark.quick


def write_run(path: Path, steps: int = 20, lr: float = 1e-3, *, moe: bool = False) -> Path:
    path.mkdir(parents=True)
    rows = []
    for step in range(steps):
        row = {"step": step, "loss": 4 - step / steps, "lr": lr, "grad_norm": 1.0, "seconds": 0.5}
        row |= {"tokens": 100 * (step + 1), "tokens_per_second": 200.0, "mfu": 0.25}
        row |= {"eval_seconds": 0.005}
        if step % 10 == 9:
            row |= {"state_rms/00": 0.5, "activation_rms/00": 1.0, "activation_rms/01": 2.0}
            row |= {"validation/loss": 4.0, "validation/bits_per_byte": 2.0}
            row |= {"expert_load": [[0.25, 0.75], [0.5, 0.5]]} if moe else {}
        rows.append(row | {"moe/max_load": 1.5} if moe else row)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (path / "metrics.jsonl").write_text(text + '{"step": 99, "lo')  # torn
    (path / "recipe.yaml").write_text(
        f"name: {path.name}\nsteps: {steps}\noptimizer: {{lr: {lr}}}\n"
    )
    return path


def write_score(run: Path, step: int, value: float) -> None:
    folder = run / "evals" / f"step-{step:09d}"
    folder.mkdir(parents=True)
    values = {"acc,none": value, "acc_stderr,none": 0.1, "alias": "piqa"}
    (folder / "piqa.json").write_text(json.dumps({"results": {"piqa": values}}))


def titles(paths: list[Path]) -> dict[str, list[str]]:
    found = sections(read_runs([str(path) for path in paths]))
    return {section.title: [panel.title for panel in section.panels] for section in found}


def test_a_page_that_loads_nothing(tmp_path: Path, capsys) -> None:
    run = write_run(tmp_path / "a<b>", moe=True)
    write_score(run, 10, 0.5)
    assert main([str(run)]) == 0
    path = Path(capsys.readouterr().out.strip())
    assert path == run / "report.html"
    text = path.read_text()
    assert "<h1>rondo: a&lt;b&gt;</h1>" in text and "prefers-color-scheme: dark" in text
    assert 'name="viewport"' in text
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=", text)
    drawn = text.rpartition("const FIGURES = ")[2].partition(";\n\nconst dark")[0]
    found = json.loads(drawn)
    assert len(found) == text.count('class="figure"')
    assert "<" not in drawn


def test_what_a_plain_run_has(tmp_path: Path) -> None:
    found = titles([write_run(tmp_path / "a")])
    assert found["Loss and learning rate"] == ["Loss", "Held-out bits per byte", "Learning rate"]
    assert found["Norms"] == ["Gradient norm", "Recurrent states", "Residual stream"]
    for absent in ("Evaluation by checkpoint", "Stages and forgetting", "Load of experts"):
        assert found[absent] == []
    assert "What differs between the recipes" not in found


def test_two_runs_are_compared(tmp_path: Path) -> None:
    runs = read_runs([str(write_run(tmp_path / name, lr=lr)) for name, lr in (("a", 1), ("b", 2))])
    assert differences(runs) == {"optimizer.lr": ["1", "2"]}
    figure = figures.curves(runs, "lr", "learning rate")
    assert [(trace.name, trace.y[0]) for trace in figure.data] == [("a", 1), ("b", 2)]
    (table,) = list(sections(runs))[-1].panels
    assert "<td>optimizer.lr</td><td>1</td><td>2</td>" in table.table


def test_summary(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a")
    write_score(run, 20, 0.5)
    (run / "launch").mkdir()
    began = (run / "metrics.jsonl").stat().st_mtime - 40
    (run / "launch" / "events.jsonl").write_text(json.dumps({"event": "start", "time": began}))
    runs = read_runs([str(run)])
    assert runs[0].goodput is not None and runs[0].goodput.share == pytest.approx(0.25)
    row = next(sections(runs)).panels[0].table.rpartition("<tbody>")[2]
    cells = re.findall(r"<td>(.*?)</td>", row)
    assert cells[:6] == ["a", "20/20", "2,000", "3.0750", "2.0000", "200"]
    assert cells[6:] == ["25.0%", "25.0%", "1.00%"]
    figure = figures.time_spent(runs)
    assert figure is not None
    names = ["steps that count", "evaluation stalls", "slower steps and the rest"]
    assert [bar.name for bar in figure.data] == names  # what took no time is left out
    assert [bar.x[0] for bar in figure.data] == pytest.approx([0.25, 0.0025, 0.7475])
    assert len({bar.marker.color for bar in figure.data}) == 3
    table = {section.title: section for section in sections(runs)}["Speed"].panels[-1].table
    assert re.findall(r"<td>(.*?)</td><td>(.*?)</td>", table) == [
        *zip(names, ("10.0", "0.1", "29.9"), strict=True),
        ("all", "40.0"),
    ]


def test_scores_by_checkpoint(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a")
    for step, value in ((20, 0.75), (10, 0.5)):
        write_score(run, step, value)
    (trace,) = figures.scores(read_runs([str(run)]), "piqa acc").data
    assert (trace.x, trace.y, trace.error_y.array) == ((10, 20), (0.5, 0.75), (0.1, 0.1))


def test_load_of_experts_is_relative_to_the_even_one(tmp_path: Path) -> None:
    (heat,) = figures.expert_load(read_runs([str(write_run(tmp_path / "a", moe=True))])[0]).data
    assert [list(row) for row in heat.z] == [[0.5, 0.5], [1.5, 1.5], [1.0, 1.0], [1.0, 1.0]]
    assert list(heat.x) == ["10", "20"]


@pytest.mark.parametrize(
    ("content", "cells"),
    [
        (
            {"stages": ["x", "y"], "domains": ["x"], "bits_per_byte": {"matrix": [[1.5], [None]]}},
            [[1.5], [None]],
        ),
        ({"stages": ["x", "y"], "domains": ["x"], "bits_per_byte": {"matrix": [[1.5]]}}, [[1.5]]),
        ({"stages": ["x"], "domains": ["x"]}, None),
        ({"stages": ["x"], "domains": ["x"], "bits_per_byte": "no"}, None),
        ([], None),
    ],
)
def test_forgetting_is_read_with_care(tmp_path: Path, content, cells) -> None:
    run = write_run(tmp_path / "a")
    (run / "forgetting.json").write_text(json.dumps(content))
    (found,) = read_runs([str(run)])
    assert (found.forgetting and found.forgetting["bits_per_byte"]) == cells
    assert (figures.forgetting(found) is None) == (cells is None)


def test_long_runs_are_averaged_in_groups(tmp_path: Path) -> None:
    (run,) = read_runs([str(write_run(tmp_path / "a", 2500))])
    steps, values = run.series("loss")
    assert len(steps) == math.ceil(2500 / 3)
    assert (steps[0], values[0]) == (2, pytest.approx(4 - 1 / 2500))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "which run"),
        (["nowhere"], "'nowhere' is no run"),
        (["RUN", "RUN"], "given twice"),
        (["RUN", "--outptu", "x"], "did you mean output"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, words: list[str], message: str) -> None:
    run = str(write_run(tmp_path / "a"))
    with pytest.raises(UserError, match=message):
        main([run if word == "RUN" else word for word in words])


def test_help_names_the_options(capsys) -> None:
    assert main(["--help"]) == 0
    assert "--output" in capsys.readouterr().out


def test_scores_of_zero_have_an_axis_from_zero(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a")
    write_score(run, 10, 0.0)
    (data,) = read_runs([str(run)])
    figure = figures.scores([data], "piqa acc")
    assert figure is not None and figure.layout.yaxis.range == (0, 1)
    write_score(run, 20, 0.5)
    (data,) = read_runs([str(run)])
    figure = figures.scores([data], "piqa acc")
    assert figure is not None and figure.layout.yaxis.range is None


def test_curves_by_position(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a")
    for step, loss in ((10, 9.0), (20, 2.0)):
        write_score(run, step, 0.5)
        curves = {"loss": {"1": 3.0, "2": loss}, "largest_norm/00": {"1": 1.0, "2": 4.0}}
        curves["effective_rank/00"] = {"1": 1.0, "2": 1.5}
        curves["largest_variance/00"] = {"1": 1.0, "2": 250.0}
        configs = {"positions_2": {"trained_length": 1}}
        text = json.dumps({"results": {}, "curves": curves, "configs": configs})
        (run / "evals" / f"step-{step:09d}" / "positions_2.json").write_text(text)
    assert titles([run])["By position"] == [
        "Loss, positions_2",
        "Largest norm of a head's state, positions_2",
        "Largest variance of a head's state, positions_2",
        "Effective rank of states, positions_2",
    ]
    (data,) = read_runs([str(run)])
    figure = figures.by_position([data], "positions_2")
    assert figure is not None and list(figure.data[0].y) == [3.0, 2.0]  # of the newest
    assert figure.data[0].name == "a, step 20" and figure.layout.shapes[0].x0 == 1


@pytest.mark.parametrize(
    ("largest", "labels"),
    [
        (9.0, None),  # no axis in decades
        (250.0, "1 2 5 10 20 50 100 200 500 1000 2000 5000"),
        (3e4, "1 10 100 1000 10000 100000"),
        (1e18, "1 1000 1e+06 1e+09 1e+12 1e+15 1e+18"),
    ],
)
def test_labels_of_decades_are_few(largest: float, labels: str | None) -> None:
    curves = {"largest_variance/00": {1: 1.0, 2: largest}}
    run = RunData("a", Path(), [], positions={"positions_2": ByPosition(1, 1, curves)})
    figure = figures.states(run, "positions_2", "largest_variance", "")
    assert figure is not None
    axis = figure.layout.yaxis
    assert (" ".join(axis.ticktext) if axis.type == "log" else None) == labels
