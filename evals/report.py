"""`rondo report`: runs on one page of HTML that needs neither a server nor a network."""

from __future__ import annotations

import html
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import plotly.graph_objects as go

from rondo.errors import UserError
from rondo.evals import report_figures as figures
from rondo.evals import report_text
from rondo.evals.report_data import RunData, differences, read_runs
from rondo.evals.report_page import Panel, Section, page
from rondo.pretrain.options import parse_command

_LONG = 40
"""Characters of a table's cell that is broken into lines."""
_USAGE = "rondo report RUN... [--output FILE]"


@dataclass
class ReportConfig:
    """What a report shows, and where it goes."""

    runs: list[str]
    """Run folders, or names of runs under runs/; they come first, without --runs."""
    output: str = ""
    """HTML file; by default report.html in the folder of the first run."""


def main(words: Sequence[str]) -> int:
    """Runs `rondo report` with `words`."""
    first = next((i for i, word in enumerate(words) if word.startswith("-")), len(words))
    names = list(words[:first])
    if not names and "-h" not in words and "--help" not in words:
        raise UserError(f"which run? They come first: {_USAGE}")
    given = [f"--runs={json.dumps(names)}"] if names else []
    config = parse_command(ReportConfig, [*given, *words[first:]], _USAGE)
    if config is not None:
        print(write_report(config))
    return 0


def write_report(config: ReportConfig) -> Path:
    """Writes the page and returns where it is.

    Raises UserError where a run is not found or has no steps yet.
    """
    runs = read_runs(config.runs)
    path = Path(config.output) if config.output else runs[0].path / "report.html"
    title = "rondo: " + ", ".join(run.name for run in runs)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(title, [section for section in sections(runs) if section.panels]))
    return path


def sections(runs: Sequence[RunData]) -> Iterator[Section]:
    """The page from top to bottom; what no run has is left out."""
    yield Section("Runs", report_text.SUMMARY, [Panel(table=_summary(runs), wide=True)])
    yield Section("Loss and learning rate", report_text.LOSS, _panels(_of_loss(runs)))
    yield Section("Speed", report_text.SPEED, [*_panels(_of_speed(runs)), *_times(runs)])
    yield Section(
        "Evaluation by checkpoint", report_text.EVALS, [*_panels(_of_scores(runs)), *_jobs(runs)]
    )
    yield Section("By position", report_text.POSITIONS, _panels(_of_positions(runs)))
    yield Section("Stages and forgetting", report_text.FORGETTING, _panels(_of_forgetting(runs)))
    yield Section("Load of experts", report_text.EXPERTS, _panels(_of_experts(runs)))
    yield Section("Norms", report_text.NORMS, _panels(_of_norms(runs)))
    if len(runs) > 1:
        yield Section("What differs between the recipes", report_text.RECIPES, [_differences(runs)])


_STATES = {
    "largest_norm": "Largest norm of a head's state",
    "largest_variance": "Largest variance of a head's state",
    "effective_rank": "Effective rank of states",
    "first_token": "Share left of the first token's state",
}
_Figure = tuple[str, go.Figure | None]


def _panels(found: Iterator[_Figure]) -> list[Panel]:
    return [Panel(title, figure) for title, figure in found if figure is not None]


def _of_loss(runs: Sequence[RunData]) -> Iterator[_Figure]:
    yield "Loss", figures.loss(runs)
    bits = "validation/bits_per_byte"
    yield "Held-out bits per byte", figures.curves(runs, bits, "bits a byte")
    yield "Learning rate", figures.curves(runs, "lr", "learning rate")


def _of_speed(runs: Sequence[RunData]) -> Iterator[_Figure]:
    yield "Throughput", figures.curves(runs, "tokens_per_second", "tokens a second")
    yield "Model FLOPs utilisation", figures.curves(runs, "mfu", "MFU", percent=True)
    yield "Where the time went", figures.time_spent(runs)


def _of_scores(runs: Sequence[RunData]) -> Iterator[_Figure]:
    for label in sorted({label for run in runs for label in run.scores}):
        yield label, figures.scores(runs, label)


def _of_positions(runs: Sequence[RunData]) -> Iterator[_Figure]:
    for task in sorted({task for run in runs for task in run.positions}):
        yield f"Loss, {task}", figures.by_position(runs, task)
        for run in runs:
            for measure, title in _STATES.items():
                shown = _titled(f"{title}, {task}", run, runs)
                yield shown, figures.states(run, task, measure, title.lower())


def _of_forgetting(runs: Sequence[RunData]) -> Iterator[_Figure]:
    for run in runs:
        yield _titled("Bits per byte", run, runs), figures.forgetting(run)


def _of_experts(runs: Sequence[RunData]) -> Iterator[_Figure]:
    for run in runs:
        yield _titled("Load by expert", run, runs), figures.expert_load(run)
    yield "Highest load", figures.curves(runs, "moe/max_load", "x even")


def _of_norms(runs: Sequence[RunData]) -> Iterator[_Figure]:
    yield "Gradient norm", figures.curves(runs, "grad_norm", "norm", log=True)
    for run in runs:
        title = _titled("Recurrent states", run, runs)
        yield title, figures.layers(run, "state_rms", "root mean square")
        title = _titled("Residual stream", run, runs)
        yield title, figures.layers(run, "activation_rms", "root mean square")


def _titled(title: str, run: RunData, runs: Sequence[RunData]) -> str:
    return f"{title}: {run.name}" if len(runs) > 1 else title


def _summary(runs: Sequence[RunData]) -> str:
    head = ("run", "step", "tokens", "loss", "held-out bits/byte", "tokens/s", "MFU", "goodput")
    return _table([*head, "held up by evals"], [_facts(run) for run in runs])


def _facts(run: RunData) -> list[str]:
    last = run.rows[-1]
    tail = run.rows[-max(1, len(run.rows) // 10) :]
    losses = [row["loss"] for row in tail if row.get("loss") is not None]
    held = run.series("validation/bits_per_byte")[1]
    seconds = run.total("seconds")
    share = run.total("eval_seconds") / seconds if seconds else None
    speeds, usage = run.series("tokens_per_second")[1], run.series("mfu")[1]
    scored = bool(run.jobs or run.scores)
    return [
        run.name,
        f"{last['step'] + 1}/{run.recipe.get('steps', '?')}",
        _number(last.get("tokens"), ",.0f"),
        _number(sum(losses) / len(losses) if losses else None, ".4f"),
        _number(held[-1] if held else None, ".4f"),
        _number(sum(speeds) / len(speeds) if speeds else None, ",.0f"),
        _number(sum(usage) / len(usage) if usage else None, ".1%"),
        _number(run.goodput.share if run.goodput else None, ".1%"),
        _number(share if scored else None, ".2%"),
    ]


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _times(runs: Sequence[RunData]) -> list[Panel]:
    known = [(run.name, run.goodput) for run in runs if run.goodput]
    lines = [
        [part, *(_number(found.parts.get(part), ",.1f") for _, found in known)]
        for part in figures.PARTS
        if any(part in found.parts for _, found in known)
    ]
    lines.append(["all", *(f"{found.wall:,.1f}" for _, found in known)])
    head = ("seconds", *(name for name, _ in known))
    return [Panel("The same in seconds", table=_table(head, lines))] if known else []


def _jobs(runs: Sequence[RunData]) -> list[Panel]:
    lines = [
        [
            run.name,
            str(job.get("step")),
            ", ".join(job.get("tasks", [])),
            str(job.get("state")),
            str(job.get("attempts", "-")),
            _number(job.get("seconds"), ".1f"),
            str(job.get("problem") or ""),
        ]
        for run in runs
        for job in run.jobs
    ]
    head = ("run", "step", "tasks", "state", "attempts", "seconds", "problem")
    return [Panel("Eval jobs", table=_table(head, lines), wide=True)] if lines else []


def _differences(runs: Sequence[RunData]) -> Panel:
    found = differences(list(runs))
    if not found:
        return Panel(table="<p>Nothing: the recipes are alike.</p>", wide=True)
    head = ["key", *(run.name for run in runs)]
    return Panel(table=_table(head, [[key, *values] for key, values in found.items()]), wide=True)


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    def cell(text: str, tag: str) -> str:
        long = ' class="long"' if len(text) > _LONG and tag == "td" else ""
        return f"<{tag}{long}>{html.escape(text)}</{tag}>"

    def row(cells: Sequence[str], tag: str) -> str:
        return "".join(cell(text, tag) for text in cells)

    body = "".join(f"<tr>{row(line, 'td')}</tr>" for line in lines)
    return f"<table><thead><tr>{row(head, 'th')}</tr></thead><tbody>{body}</tbody></table>"
