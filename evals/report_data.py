"""What a report shows of a run, read from the files the run wrote."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rondo.errors import UserError
from rondo.goodput import Goodput, read_goodput
from rondo.pretrain.metrics import rows
from rondo.pretrain.plain import read_yaml

POINTS = 1000
"""Points of a curve; more steps are averaged in groups."""


@dataclass(frozen=True)
class Score:
    """A metric of a task on the checkpoint after `step` steps."""

    step: int
    value: float
    error: float | None
    """Standard error, where the harness gives one."""


@dataclass(frozen=True)
class ByPosition:
    """What `rondo eval` found by position in texts of one length."""

    step: int
    """Steps of the checkpoint."""
    trained: int | None
    """Tokens of a sequence in training."""
    curves: dict[str, dict[int, float]]
    """Measure, with its layer, by position."""


@dataclass
class RunData:
    """One run."""

    name: str
    """As shown: the folder's name, longer where two runs share it."""
    path: Path
    rows: list[dict[str, Any]]
    """Those of metrics.jsonl."""
    recipe: dict[str, Any] = field(default_factory=dict)
    """By dotted key."""
    scores: dict[str, list[Score]] = field(default_factory=dict)
    """By "task metric", in order of steps."""
    positions: dict[str, ByPosition] = field(default_factory=dict)
    """By task, of the newest checkpoint that has it."""
    jobs: list[dict[str, Any]] = field(default_factory=list)
    """What the eval jobs say of themselves."""
    forgetting: dict[str, Any] | None = None
    """Of `forgetting.json`: stages, domains, bits_per_byte[stage][domain]; None where unknown."""
    goodput: Goodput | None = None
    """Where the time since the first start went; None where that is not known."""

    def series(self, key: str) -> tuple[list[float], list[float]]:
        """Steps done and values of a metric, averaged in groups where there are many."""
        found = [(row["step"] + 1, row[key]) for row in self.rows if _is_number(row.get(key))]
        size = math.ceil(len(found) / POINTS) or 1
        groups = [found[at : at + size] for at in range(0, len(found), size)]
        means = [
            [sum(column) / len(group) for column in zip(*group, strict=True)] for group in groups
        ]
        return [step for step, _ in means], [value for _, value in means]

    def keys(self, prefix: str) -> list[str]:
        """Metrics whose names begin so."""
        return sorted({key for row in self.rows for key in row if key.startswith(prefix)})

    def total(self, key: str) -> float:
        """Sum of a metric over all steps."""
        return sum(row[key] for row in self.rows if _is_number(row.get(key)))

    @property
    def tables(self) -> list[tuple[int, list[list[float]]]]:
        """Steps done and loads of the experts: a row a mixture."""
        return [(row["step"] + 1, row["expert_load"]) for row in self.rows if "expert_load" in row]


def read_runs(words: list[str]) -> list[RunData]:
    """The runs in folders, or of names under runs/. Raises UserError where there is none."""
    paths = []
    for word in words:
        found = [path for path in (Path(word), Path("runs") / word) if _metrics(path).exists()]
        if not found:
            raise UserError(f"{word!r} is no run: there is no {_metrics(Path(word))}")
        if found[0] in paths:
            raise UserError(f"{word!r} is given twice")
        paths.append(found[0])
    names = [path.resolve().name for path in paths]
    shown = [
        name if names.count(name) == 1 else str(path)
        for path, name in zip(paths, names, strict=True)
    ]
    return [read_run(path, name) for path, name in zip(paths, shown, strict=True)]


def read_run(path: Path, name: str) -> RunData:
    """The run in a folder. Raises UserError where it has no steps yet."""
    found = rows(_metrics(path), before=1 << 62)
    if not found:
        raise UserError(f"{_metrics(path)} has no steps yet")
    return RunData(
        name=name,
        path=path,
        rows=found,
        recipe=_recipe(path),
        scores=_scores(path),
        positions=_positions(path),
        jobs=[_json(file) for file in sorted((path / "evals" / "jobs").glob("step-*/job.json"))],
        forgetting=_forgetting(path),
        goodput=read_goodput(path),
    )


def differences(runs: list[RunData]) -> dict[str, list[str]]:
    """Keys of the recipes that are not alike in all runs, with the value in each; where the run
    is put is left out."""
    keys = sorted({key for run in runs for key in run.recipe} - {"name", "output_dir"})
    values = {key: [_shown(run.recipe.get(key)) for run in runs] for key in keys}
    return {key: row for key, row in values.items() if len({*row}) > 1}


def _metrics(path: Path) -> Path:
    return path / "metrics.jsonl"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _json(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is none that can be read."""
    try:
        found = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _recipe(path: Path) -> dict[str, Any]:
    file = path / "recipe.yaml"
    return dict(_leaves(read_yaml(file.read_text()))) if file.exists() else {}


def _leaves(plain: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(plain, dict):
        for name, value in plain.items():
            yield from _leaves(value, f"{key}.{name}" if key else str(name))
    else:
        yield key, plain


def _shown(value: Any) -> str:
    return "-" if value is None else value if isinstance(value, str) else json.dumps(value)


def _scores(path: Path) -> dict[str, list[Score]]:
    """Results as lm-eval writes them: `"metric,filter": value` with `"metric_stderr,filter"`."""
    found: dict[str, list[Score]] = {}
    for file in sorted((path / "evals").glob("step-*/*.json")):
        step = file.parent.name[5:]
        results = _json(file).get("results")
        if not step.isdecimal() or not isinstance(results, dict):
            continue
        for task, values in results.items():
            for metric, value in values.items() if isinstance(values, dict) else ():
                name, _, way = metric.partition(",")
                if _is_number(value) and not name.endswith("_stderr") and way:
                    error = values.get(f"{name}_stderr,{way}")
                    label = f"{task} {name}" + ("" if way == "none" else f" ({way})")
                    score = Score(int(step), value, error if _is_number(error) else None)
                    found.setdefault(label, []).append(score)
    return {label: sorted(scores, key=lambda each: each.step) for label, scores in found.items()}


def _positions(path: Path) -> dict[str, ByPosition]:
    found = {}
    for file in sorted((path / "evals").glob("step-*/*_*.json")):
        if not file.name.startswith(("positions_", "newlines_", "capitals_")):
            continue
        step, result = file.parent.name[5:], _json(file)
        curves = result.get("curves")
        if not step.isdecimal() or not isinstance(curves, dict):
            continue
        points = {
            str(name): {int(at): v for at, v in curve.items() if _is_number(v)}
            for name, curve in curves.items()
            if isinstance(curve, dict)
        }
        trained = result.get("configs", {}).get(file.stem, {}).get("trained_length")
        found[file.stem] = ByPosition(int(step), trained, points)
    return found


def _forgetting(path: Path) -> dict[str, Any] | None:
    found = _json(path / "forgetting.json")
    stages, domains = found.get("stages"), found.get("domains")
    kind = found.get("bits_per_byte")
    table = kind.get("matrix") if isinstance(kind, dict) else None
    if not (isinstance(stages, list) and isinstance(domains, list) and isinstance(table, list)):
        return None
    cells = [
        [value if _is_number(value) else None for value in row[: len(domains)]]
        for row in table[: len(stages)]
        if isinstance(row, list)
    ]
    if not cells:
        return None
    names = [str(stage) for stage in stages[: len(cells)]]
    return {"stages": names, "domains": [str(each) for each in domains], "bits_per_byte": cells}
