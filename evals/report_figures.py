"""The figures of a report. Each function gives one, or None where no run has what it shows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from rondo.evals.report_data import RunData
from rondo.goodput import LOST

COLORS = ("#3b82c4", "#e07b39", "#4b9e6a", "#b65fcf", "#c94f5d", "#8a7f3d", "#2fa5a5", "#8b8f98")
"""Readable on white and on dark grey."""
_LOSS = "loss (nats a token)"
PARTS = ("steps that count", *LOST)
"""Of the time of a run, as `Goodput.parts` calls them."""
_COLORS_OF_PARTS = (2, 0, 3, 5, 1, 4, 6, 7)


def color(index: int) -> str:
    """Colour of the run, or layer, of a number."""
    return COLORS[index % len(COLORS)]


def curves(
    runs: Sequence[RunData], key: str, title: str, *, log: bool = False, percent: bool = False
) -> go.Figure | None:
    """A metric by step, a line a run."""
    figure = go.Figure()
    for index, run in enumerate(runs):
        steps, values = run.series(key)
        if values:
            figure.add_scatter(x=steps, y=values, name=run.name, mode="lines", line=_line(index))
    figure.update_layout(yaxis={"tickformat": ".1%"} if percent else {})
    return _finish(figure, title, log=log)


def loss(runs: Sequence[RunData]) -> go.Figure | None:
    """Training loss as a line, held-out loss as points on a dotted one."""
    figure = go.Figure()
    for index, run in enumerate(runs):
        steps, values = run.series("loss")
        figure.add_scatter(x=steps, y=values, name=run.name, mode="lines", line=_line(index))
        steps, values = run.series("validation/loss")
        if values:
            name = f"{run.name}, held out"
            line = {**_line(index), "dash": "dot"}
            figure.add_scatter(x=steps, y=values, name=name, mode="lines+markers", line=line)
    return _finish(figure, _LOSS)


def layers(run: RunData, prefix: str, title: str) -> go.Figure | None:
    """A metric that is logged by layer, a line a layer."""
    figure = go.Figure()
    for index, key in enumerate(run.keys(f"{prefix}/")):
        steps, values = run.series(key)
        name = f"layer {int(layer)}" if (layer := key.partition("/")[2]).isdecimal() else layer
        mode = "lines+markers" if len(steps) < 30 else "lines"
        figure.add_scatter(x=steps, y=values, name=name, mode=mode, line=_line(index))
    return _finish(figure, title, log=True)


def time_spent(runs: Sequence[RunData]) -> go.Figure | None:
    """Where the time of each run went, as shares."""
    known = [(run.name, run.goodput) for run in runs if run.goodput]
    figure = go.Figure()
    names = [name for name, _ in known]
    for index, part in enumerate(PARTS):
        seconds = [found.parts.get(part, 0.0) for _, found in known]
        if not any(seconds):
            continue
        shares = [each / found.wall for each, (_, found) in zip(seconds, known, strict=True)]
        bar = {"color": color(_COLORS_OF_PARTS[index])}
        figure.add_bar(
            x=shares,
            y=names,
            name=part,
            customdata=seconds,
            orientation="h",
            marker=bar,
            width=0.5,
            hovertemplate="%{y}: %{x:.1%}, %{customdata:,.1f} s",
        )
    figure.update_layout(
        barmode="stack", xaxis={"tickformat": ".0%", "dtick": 0.25, "range": [0, 1]}
    )
    return _finish(figure, "", x="share of the time since the first start")


def expert_load(run: RunData) -> go.Figure | None:
    """Load of each expert over the even one, by layer and step: a block of rows a mixture."""
    if not run.tables:
        return None
    steps = [step for step, _ in run.tables]
    names, values = [], []
    for layer in range(len(run.tables[-1][1])):
        for expert in range(len(run.tables[-1][1][layer])):
            names.append(f"mixture {layer}, expert {expert}")
            values.append([_load(table, layer, expert) for _, table in run.tables])
    figure = go.Figure()
    figure.add_heatmap(
        z=values,
        x=[str(step) for step in steps],
        y=list(range(len(names))),
        customdata=[[name] * len(steps) for name in names],
        hovertemplate="%{customdata}<br>step %{x}: %{z:.2f} x even<extra></extra>",
        colorscale="Cividis",
        zmin=0,
        zmax=max(2.0, max(map(max, values))),
        colorbar={"title": {"text": "x even"}, "thickness": 12},
    )
    count = len(run.tables[-1][1])
    each = len(names) // count
    ticks = [each * layer + (each - 1) / 2 for layer in range(count)]
    borders = [each * layer - 0.5 for layer in range(1, count)]
    figure.update_layout(
        yaxis={
            "tickvals": ticks,
            "ticktext": [f"mixture {i}" for i in range(count)],
            "autorange": "reversed",
        },
        xaxis={"type": "category"},
        shapes=[
            {
                "type": "line",
                "xref": "paper",
                "x0": 0,
                "x1": 1,
                "y0": y,
                "y1": y,
                "line": {"color": "white", "width": 1},
            }
            for y in borders
        ],
    )
    return _finish(figure, "")


def _load(table: list[list[float]], layer: int, expert: int) -> float:
    return table[layer][expert] * len(table[layer])


def scores(runs: Sequence[RunData], label: str) -> go.Figure | None:
    """A task's metric by checkpoint, with its standard error."""
    figure = go.Figure()
    for index, run in enumerate(runs):
        found = run.scores.get(label)
        if found:
            figure.add_scatter(
                x=[score.step for score in found],
                y=[score.value for score in found],
                error_y={"array": [score.error or 0.0 for score in found], "thickness": 1},
                name=run.name,
                mode="lines+markers",
                line=_line(index),
            )
    values = [score.value for run in runs for score in run.scores.get(label, ())]
    if values and not any(values):  # which plotly would put in the middle of -1 to 1
        figure.update_yaxes(range=[0, 1])
    return _finish(figure, label.partition(" ")[2])


def by_position(runs: Sequence[RunData], task: str) -> go.Figure | None:
    """Loss by the number of tokens before, a line a run; dots where training ended."""
    figure = go.Figure()
    for index, run in enumerate(runs):
        if (found := run.positions.get(task)) and (loss := found.curves.get("loss")):
            _points(figure, loss, f"{run.name}, step {found.step}", index)
            _mark(figure, found.trained, index)
    return _finish(figure, _LOSS, x="tokens before", log_x=True)


def states(run: RunData, task: str, measure: str, title: str) -> go.Figure | None:
    """A measure of states by the number of tokens read, a line a layer."""
    figure, found = go.Figure(), run.positions.get(task)
    for name, points in found.curves.items() if found else ():
        if name.startswith(f"{measure}/"):
            layer = int(name.partition("/")[2])
            _points(figure, points, f"layer {layer}", layer)
    if found and figure.data:
        _mark(figure, found.trained, 7)
    return _finish(figure, title, log=True, x="tokens read", log_x=True)


def _points(figure: go.Figure, points: dict[int, float], name: str, index: int) -> None:
    x, y = list(points), list(points.values())
    figure.add_scatter(x=x, y=y, name=name, mode="lines+markers", line=_line(index))


def _mark(figure: go.Figure, length: int | None, index: int) -> None:
    """The length of a sequence in training."""
    if length:
        line = {"color": color(index), "width": 1, "dash": "dot"}
        figure.add_vline(x=length, line=line)


def forgetting(run: RunData) -> go.Figure | None:
    """Bits per byte of each domain's held-out text after each stage."""
    found = run.forgetting
    if not found:
        return None
    table = found["bits_per_byte"]
    figure = go.Figure()
    figure.add_heatmap(
        z=table,
        x=found["domains"],
        y=found["stages"],
        colorscale="Cividis_r",
        text=[["" if cell is None else f"{cell:.3f}" for cell in row] for row in table],
        texttemplate="%{text}",
        hovertemplate="after %{y}, %{x}: %{z:.3f}<extra></extra>",
        colorbar={"title": {"text": "bits a byte"}, "thickness": 12},
    )
    figure.update_layout(
        yaxis={"autorange": "reversed", "type": "category"}, xaxis={"type": "category"}
    )
    return _finish(figure, "after stage", x="domain")


def _line(index: int) -> dict[str, object]:
    return {"color": color(index), "width": 1.8}


def _finish(
    figure: go.Figure, y: str, *, x: str = "step", log: bool = False, log_x: bool = False
) -> go.Figure | None:
    if not figure.data:
        return None
    if log_x:
        powers = [4**k for k in range(12)]
        figure.update_xaxes(type="log", tickvals=powers, ticktext=[f"{p:,}" for p in powers])
    ticks = _decades(figure) if log else {}
    axis = {"type": "log", **ticks} if ticks else {}
    figure.update_yaxes(title={"text": y}, automargin=True, **axis)
    figure.update_xaxes(title={"text": x}, automargin=True)
    # Colours of text and lines are the page's, which knows whether it is light or dark.
    figure.update_layout(
        template="none",
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        margin={"l": 10, "r": 10, "t": 10, "b": 10},
        legend={"orientation": "h", "y": -0.35, "yanchor": "top", "x": 0, "traceorder": "normal"},
        showlegend=len(list(figure.data)) > 1,
        hovermode="closest",
    )
    return figure


def _decades(figure: go.Figure) -> dict[str, list[Any]]:
    """Ticks of a logarithmic axis, few enough that their labels do not overlap; none where the
    values are not positive, or do not span more than a decade and may lie between two ticks."""
    traces: Any = figure.data
    values = [value for trace in traces for value in trace.y]
    if min(values) <= 0 or max(values) / min(values) <= 10:
        return {}
    first, last = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    digits = (1, 2, 5) if last - first <= 3 else (1,)
    powers = range(first, last + 1, max(1, (last - first) // 6))
    ticks = [digit * 10.0**power for power in powers for digit in digits]
    return {"tickvals": ticks, "ticktext": [f"{tick:g}" for tick in ticks]}
