"""`rondo forgetting`: what runs in stages have learnt and forgotten.

With L_d(k) the validation loss on domain d at the end of stage k (row 0: before the first step),
and k_d the last stage on d so far, the forgetting of d in row k is L_d(k) - L_d(k_d): how much
worse d is than when it was left (arXiv 2403.08763, in nats a token and in bits per byte). Another
run that is replayed was left where it was first looked at. The adaptation of stage k is the loss
on its own domain.

A run that goes on with another, or from before it had stages, has rows of the stages that ended
there too: with what was known or measured when it began.

`forgetting.json` in the run folder holds the matrices (stage x domain), `forgetting.html` shows
the curves, and TensorBoard gets the matrix as a heat map.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from rondo.errors import UserError
from rondo.pretrain.line_chart import html_page, line_chart
from rondo.pretrain.metrics import heat_map, rows
from rondo.pretrain.options import parse_command, split_arguments

KINDS = ("loss", "bits_per_byte")
_USAGE = "rondo forgetting RUN [RUN...] [--html FILE]"


@dataclass
class ForgettingConfig:
    """What to tell of."""

    run: str
    """Folder of a run in stages; several are compared."""
    html: str | None = None
    """File for the plot; None: forgetting.html in the (first) run folder."""


class Matrix:
    """What a run in stages has measured so far.

    Raises UserError where it has no stages, or validated nothing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        plan = folder / "stages.json"
        if not plan.is_file():
            raise UserError(f"{folder}: not the folder of a run in stages: it has no stages.json")
        described = json.loads(plan.read_text())
        self.stages: list[dict[str, Any]] = described["stages"]
        self.steps: int = described["steps"]
        owned = [stage["domain"] for stage in self.stages]
        self.domains = [*dict.fromkeys([*owned, *described["replayed_runs"]])]
        self.points = _points(rows(folder / "metrics.jsonl", before=self.steps), self.domains)
        reached = [(stage, done) for stage in self.stages if (done := self._last(stage))]
        self.reached = [stage for stage, _ in reached]
        self.after = [done for _, done in reached]
        """Steps done at the last measurement of each stage that was reached."""
        if not reached:
            raise UserError(f"{folder}: nothing was validated yet (evals.batches)")

    def _last(self, stage: dict[str, Any]) -> int:
        """Steps done at the last measurement of a stage; 0 where there is none."""
        begin, end = stage["start"], stage["start"] + stage["steps"]
        return max((done for done in self.points if begin < done <= end), default=0)

    def values(self, kind: str) -> list[list[float | None]]:
        """`kind` by row (before, then stages that were reached) and domain; None where it was not
        measured."""
        points = [self.points.get(done, {}) for done in (0, *self.after)]
        return [[point.get(f"{name}/{kind}") for name in self.domains] for point in points]

    def forgetting(self, kind: str) -> list[list[float | None]]:
        """By stage that was reached and domain; None for domains that were not left yet."""
        values = self.values(kind)
        left: dict[str, float | None] = {}
        for name in {*self.domains} - {stage["domain"] for stage in self.stages}:
            first = (point for _, point in sorted(self.points.items()) if f"{name}/{kind}" in point)
            left[name] = next(first, {}).get(f"{name}/{kind}")
        found = []
        for stage, row in zip(self.reached, values[1:], strict=True):
            named = dict(zip(self.domains, row, strict=True))
            found.append(
                [_minus(named[d], left.get(d), d == stage["domain"]) for d in self.domains]
            )
            left[stage["domain"]] = named[stage["domain"]]
        return found

    def data(self) -> dict[str, Any]:
        """All of it, for JSON."""
        own = [self.domains.index(stage["domain"]) for stage in self.reached]
        found: dict[str, Any] = {
            "domains": self.domains,
            "stages": [stage["name"] for stage in self.reached],
            "after_steps": self.after,
            "finished": [
                done == stage["start"] + stage["steps"]
                for stage, done in zip(self.reached, self.after, strict=True)
            ],
        }
        for kind in KINDS:
            before, *matrix = self.values(kind)
            found[kind] = {
                "before": before,
                "matrix": matrix,
                "forgetting": self.forgetting(kind),
                "adaptation": [row[i] for row, i in zip(matrix, own, strict=True)],
            }
        return found

    def curves(self, prefix: str = "") -> dict[str, list[tuple[int, float]]]:
        """Bits per byte by domain, over steps done."""
        found: dict[str, list[tuple[int, float]]] = {}
        for name in self.domains:
            key = f"{name}/bits_per_byte"
            line = [(done, at[key]) for done, at in sorted(self.points.items()) if at.get(key)]
            if line:
                found[prefix + name] = line
        return found


def _points(
    found: Sequence[Mapping[str, Any]], domains: Sequence[str]
) -> dict[int, dict[str, float]]:
    """What rows of metrics tell of `domains`: by steps done, values by `domain/kind`."""
    points: dict[int, dict[str, float]] = {}
    for row in found:
        when = {"validation_before": row["step"], "validation": row["step"] + 1}
        for key, value in row.items():
            group, _, name = key.partition("/")
            domain = name.rpartition("/")[0]
            done = row.get(f"learnt/{domain}/step") if group == "learnt" else when.get(group)
            if domain in domains and done is not None:
                points.setdefault(done, {})[name] = value
    return points


def _minus(value: float | None, left: float | None, own: bool) -> float | None:
    return None if own or value is None or left is None else value - left


def report(folders: Sequence[Path], html: Path | None = None) -> list[dict[str, Any]]:
    """Writes JSON and TensorBoard's picture of each run, and the plot of all; returns the JSON."""
    matrices = [Matrix(folder) for folder in folders]
    found = []
    for matrix in matrices:
        found.append(matrix.data())
        (matrix.folder / "forgetting.json").write_text(json.dumps(found[-1], indent=1))
        if (matrix.folder / "tensorboard").is_dir():
            _write_event(matrix)
    path = html or folders[0] / "forgetting.html"
    path.write_text(_page(matrices), "utf-8")
    console = Console(width=None if Console().is_terminal else 120)
    for matrix in matrices:
        console.print(_table(matrix))
    console.print(f"wrote {path} and forgetting.json", highlight=False)
    return found


def _table(matrix: Matrix) -> Table:
    """Bits per byte by stage and domain, with what was forgotten."""
    table = Table("after", *matrix.domains, title=f"{matrix.folder.name}: bits per byte")
    for row in _cells(matrix):
        table.add_row(*row)
    return table


def _cells(matrix: Matrix) -> list[list[str]]:
    """Rows of the table; one of what was before the first step only where that was measured."""
    values, lost = matrix.values("bits_per_byte"), matrix.forgetting("bits_per_byte")
    names = ["(before)", *(stage["name"] for stage in matrix.reached)]
    nothing: list[float | None] = [None] * len(matrix.domains)
    found = [
        [name, *(_cell(*pair) for pair in zip(row, gone, strict=True))]
        for name, row, gone in zip(names, values, [nothing, *lost], strict=True)
    ]
    return found if 0 in matrix.points else found[1:]


def _cell(value: float | None, lost: float | None) -> str:
    text = "-" if value is None else f"{value:.4f}"
    return text if lost is None else f"{text} ({lost:+.4f})"


def _page(matrices: Sequence[Matrix]) -> str:
    several = len(matrices) > 1
    lines: dict[str, list[tuple[int, float]]] = {}
    for matrix in matrices:
        lines |= matrix.curves(f"{matrix.folder.name}: " if several else "")
    marks = [(stage["start"], stage["name"]) for stage in matrices[0].stages]
    low = min(value for points in lines.values() for _, value in points)
    last = max(matrix.steps for matrix in matrices)
    title = escape(f"Forgetting: {', '.join(matrix.folder.name for matrix in matrices)}")
    body = [
        f"<h1>{title}</h1><p>Validation, bits per byte; in brackets what was forgotten since a "
        "domain's own last stage.</p>",
        line_chart(lines, marks, last=last, low=low, form=".2f"),
    ]
    for matrix in matrices:
        heads = "".join(f'<th class="n">{escape(d)}</th>' for d in matrix.domains)
        rest = "".join(
            f"<tr><th>{escape(name)}</th>"
            + "".join(f'<td class="n">{cell}</td>' for cell in cells)
            + "</tr>"
            for name, *cells in _cells(matrix)
        )
        name = escape(matrix.folder.name)
        body.append(f"<h2>{name}</h2><table><tr><th>after</th>{heads}</tr>{rest}</table>")
    return html_page(title, body)


def _write_event(matrix: Matrix) -> None:
    """The matrix of losses as a heat map, darkest where the loss is highest, striped where it was
    not measured."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(matrix.folder / "tensorboard")) as events:
        writer: Any = events._get_file_writer()
        step = max(matrix.points) - 1
        writer.add_summary(heat_map("forgetting/matrix", matrix.values("loss")[1:], cell=32), step)


def main(words: Sequence[str]) -> int:
    """Runs the command. Returns the exit code."""
    found = split_arguments(words)
    first, more = found.positional[:1], found.positional[1:]
    options = [f"--{key}={value}" for key, value in found.options]
    options += ["--help"] if found.wants_help else []
    config = parse_command(ForgettingConfig, [*first, *options], _USAGE, ("run",))
    if config is not None:
        report([Path(config.run), *map(Path, more)], Path(config.html) if config.html else None)
    return 0
