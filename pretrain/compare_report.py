"""What `rondo compare` writes of its runs: mean and standard deviation over seeds, differences
within seeds, and a picture."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from html import escape
from typing import Any

from rondo.parallel.plan.page import COLOURS, html_page

Scores = dict[tuple[str, int], dict[int, dict[str, float]]]
"""Loss by (value, seed), step and domain."""
_WIDTH, _HEIGHT, _LEFT = 640, 220, 60
"""A picture's plot in pixels, and the room beside it."""


def results(
    title: str, values: Sequence[str], seeds: Sequence[int], scores: Scores
) -> dict[str, Any]:
    """Plain data: for every value, step and domain the losses by seed, their mean and sample
    standard deviation, and the same of the differences to the first value's run of that seed.

    Domains get a companion `mean`, the mean over domains (each counts alike). `missing` are the
    runs, of each of `values` with each of `seeds`, that `scores` does not have yet.
    """
    rows = []
    for value in values:
        done = [seed for name, seed in scores if name == value]
        for step in sorted({step for seed in done for step in scores[value, seed]}):
            domains = [*scores[value, done[0]][step], "mean"]
            for domain in domains:
                losses = {seed: _loss(scores[value, seed][step], domain) for seed in done}
                base = {
                    seed: _loss(scores[values[0], seed][step], domain)
                    for seed in done
                    if (values[0], seed) in scores
                }
                pairs = [losses[seed] - base[seed] for seed in base]
                rows.append(
                    {"value": value, "step": step, "domain": domain, "losses": losses}
                    | spread(list(losses.values()))
                    | {"difference": spread(pairs)}
                )
    missing = [[value, seed] for seed in seeds for value in values if (value, seed) not in scores]
    named = {"title": title, "values": list(values), "seeds": list(seeds)}
    return {**named, "missing": missing, "rows": rows}


def spread(numbers: Sequence[float]) -> dict[str, float | None]:
    """Mean and sample standard deviation (None of a single number)."""
    deviation = statistics.stdev(numbers) if len(numbers) > 1 else None
    return {"mean": statistics.fmean(numbers), "deviation": deviation}


def markdown(data: dict[str, Any]) -> str:
    """The table of the last step."""
    rows = _last(data)
    domains = list(dict.fromkeys(row["domain"] for row in rows))
    seeds = len(data["seeds"])
    lines = [
        f"# {data['title']}",
        "",
        f"Unweighted held-out loss, nats a token, at step {rows[0]['step']}: mean ± standard "
        f"deviation over {seeds} {'seed' if seeds == 1 else 'seeds'}. In brackets, mean ± "
        f"standard deviation of the differences to `{data['values'][0]}` within seeds."
        f"{_missing(data)}",
        "",
        f"| | {' | '.join(domains)} |",
        f"| --- |{' --- |' * len(domains)}",
    ]
    for value in data["values"]:
        found = {row["domain"]: row for row in rows if row["value"] == value}
        if found:
            cells = [_cell(found[domain], value == data["values"][0]) for domain in domains]
            done = len(found["mean"]["losses"])
            name = value if done == seeds else f"{value} ({done} of {seeds} seeds)"
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _missing(data: dict[str, Any]) -> str:
    """Which runs are not finished, as a sentence; nothing if all are."""
    missing = data["missing"]
    if not missing:
        return ""
    runs = len(data["values"]) * len(data["seeds"])
    names = ", ".join(f"{value} with seed {seed}" for value, seed in missing)
    return f" {runs - len(missing)} of {runs} runs are finished; missing: {names}."


def page(data: dict[str, Any]) -> str:
    """An HTML page: a curve a domain over the steps (bars: one standard deviation), and the table
    of the last step."""
    domains = list(dict.fromkeys(row["domain"] for row in data["rows"]))
    legend = " ".join(
        f'<span class="item"><span class="key" style="background:{_colour(i)}"></span>'
        f"{escape(value)}</span>"
        for i, value in enumerate(data["values"])
    )
    title = escape(data["title"])
    note = f"<p>{escape(_missing(data).strip())}</p>" if data["missing"] else ""
    body = [f'<h1>{title}</h1>{note}<p class="legend">{legend}</p>']
    for domain in domains:
        body.append(f"<h2>{escape(domain)}</h2>{_picture(data, domain)}")
    cells = [line.strip("| ").split(" | ") for line in markdown(data).splitlines()[6:]]
    heads = "".join(f"<th>{escape(name)}</th>" for name in ["", *domains])
    lines = "".join(f"<tr>{''.join(f'<td>{escape(c)}</td>' for c in line)}</tr>" for line in cells)
    body.append(f"<h2>Last step</h2><table><tr>{heads}</tr>{lines}</table>")
    return html_page(title, body)


def _picture(data: dict[str, Any], domain: str) -> str:
    rows = [row for row in data["rows"] if row["domain"] == domain]
    low = min(row["mean"] - (row["deviation"] or 0) for row in rows)
    high = max(row["mean"] + (row["deviation"] or 0) for row in rows)
    last = max(row["step"] for row in rows)

    def at(step: int, loss: float) -> tuple[float, float]:
        share = (high - loss) / (high - low) if high > low else 0.5
        return _LEFT + _WIDTH * step / last, 10 + _HEIGHT * share

    shapes = []
    for i in range(5):
        x, y = at(last * i // 4, low + (high - low) * i / 4)
        label = f"{low + (high - low) * i / 4:.3f}"
        shapes += [
            f'<line x1="{_LEFT}" x2="{_LEFT + _WIDTH}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>',
            f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{label}</text>',
            f'<text x="{x:.1f}" y="{_HEIGHT + 28}" text-anchor="middle">{last * i // 4:,}</text>',
        ]
    for i, value in enumerate(data["values"]):
        own = [row for row in rows if row["value"] == value]
        line = " ".join("{:.1f},{:.1f}".format(*at(row["step"], row["mean"])) for row in own)
        shapes.append(f'<polyline points="{line}" fill="none" stroke="{_colour(i)}"/>')
        for row in own:
            x, top = at(row["step"], row["mean"] + (row["deviation"] or 0))
            _, below = at(row["step"], row["mean"] - (row["deviation"] or 0))
            ends = f'x1="{x:.1f}" x2="{x:.1f}" y1="{top:.1f}" y2="{below:.1f}"'
            shapes.append(f'<line {ends} stroke="{_colour(i)}" stroke-width="2"/>')
    size = f'width="{_LEFT + _WIDTH + 40}" height="{_HEIGHT + 40}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">{"".join(shapes)}</svg>'


def _last(data: dict[str, Any]) -> list[dict[str, Any]]:
    last = max(row["step"] for row in data["rows"])
    return [row for row in data["rows"] if row["step"] == last]


def _loss(losses: dict[str, float], domain: str) -> float:
    return statistics.fmean(losses.values()) if domain == "mean" else losses[domain]


def _cell(row: dict[str, Any], first: bool) -> str:
    text = _number(row)
    return text if first else f"{text} ({_number(row['difference'], '+')})"


def _number(found: dict[str, Any], sign: str = "") -> str:
    deviation = "" if found["deviation"] is None else f" ± {found['deviation']:.4f}"
    return f"{found['mean']:{sign}.4f}{deviation}"


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]
