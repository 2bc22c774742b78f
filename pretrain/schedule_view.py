"""`rondo plan --schedule`: a recipe's learning rate on the console, as JSON, or as a page."""

from __future__ import annotations

import math
from html import escape
from typing import Any

from rich.console import Console
from rich.table import Table

from rondo.parallel.plan.page import COLOURS, html_page
from rondo.pretrain.recipe import Recipe
from rondo.pretrain.schedules import INFINITE, factor, phases

_ROWS = 12
_BLOCKS = " ▁▂▃▄▅▆▇█"
_WIDTH, _HEIGHT, _LEFT, _BELOW = 900, 320, 70, 40
"""The picture's plot in pixels, and the room beside and below it."""


class Curve:
    """The learning rate of a recipe's run."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe, self.steps = recipe, recipe.steps
        self.step_tokens = recipe.data.global_batch_size * recipe.data.sequence_length
        self.title = (
            f"{recipe.name}: {recipe.schedule.name}, {self.steps:,} steps of "
            f"{self.step_tokens:,} tokens"
        )

    def __call__(self, step: int) -> float:
        """Learning rate of a step."""
        share = factor(step, self.steps, self.recipe.schedule, self.step_tokens)
        return self.recipe.optimizer.lr * share

    def samples(self, count: int) -> list[int]:
        """At most `count` steps, evenly spread from the first to the last."""
        last = self.steps - 1
        return sorted({round(i * last / max(1, count - 1)) for i in range(count)})

    def borders(self) -> list[int]:
        """First steps of the phases, and the last step."""
        schedule = self.recipe.schedule
        lengths = phases(schedule, self.steps, self.step_tokens)
        found = {0, lengths.warmup, self.steps - 1}
        if schedule.name in INFINITE:
            found |= {lengths.warmup + lengths.cooldown, self.steps - lengths.decay}
        if schedule.name.startswith("wsd"):
            found |= {end - lengths.decay for end in lengths.ends} | {*lengths.ends}
            found |= {end - 1 for end in lengths.ends}
        return sorted(step for step in found if 0 <= step < self.steps)


def show_schedule(curve: Curve, console: Console) -> None:
    """Draws the learning rate as columns, and prints it where a phase begins or ends."""
    console.print(f"learning rate of {curve.title}", highlight=False)
    values = [curve(step) for step in curve.samples(max(10, min(console.width - 12, 100)))]
    top = max(values)
    for row in reversed(range(_ROWS)):
        label = f"{top * (row + 1) / _ROWS:.2e}" if row % 3 == 2 else ""
        cells = (min(8, max(0, math.ceil(8 * (v / top * _ROWS - row)))) for v in values)
        console.print(f"{label:>9} {''.join(_BLOCKS[cell] for cell in cells)}", highlight=False)
    last = f"step {curve.steps - 1:,}"
    console.print(f"{'':>9} {'0':<{max(1, len(values) - len(last))}}{last}", highlight=False)
    table = Table("step", "tokens before it", "learning rate")
    for column in table.columns:
        column.justify = "right"
    for step in curve.borders():
        table.add_row(f"{step:,}", f"{step * curve.step_tokens:,}", f"{curve(step):.4e}")
    console.print(table)


def schedule_data(curve: Curve) -> dict[str, Any]:
    """The learning rate at a thousand steps or fewer, for JSON."""
    steps = curve.samples(1001)
    return {
        "steps": curve.steps,
        "tokens_per_step": curve.step_tokens,
        "borders": curve.borders(),
        "step": steps,
        "lr": [curve(step) for step in steps],
    }


def schedule_page(curve: Curve) -> str:
    """An HTML page with the curve, its phases and their learning rates."""
    points = [(step, curve(step)) for step in sorted({*curve.samples(1001), *curve.borders()})]
    top, last = max(lr for _, lr in points), max(1, curve.steps - 1)

    def at(step: int, lr: float) -> tuple[float, float]:
        return _LEFT + _WIDTH * step / last, 10 + _HEIGHT * (1 - lr / top)

    shapes = []
    for i in range(5):
        _, y = at(0, top * i / 4)
        x, _ = at(last * i // 4, 0)
        shapes += [
            f'<line x1="{_LEFT}" x2="{_LEFT + _WIDTH}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>',
            f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{top * i / 4:.2e}</text>',
            f'<text x="{x:.1f}" y="{_HEIGHT + 28}" text-anchor="middle">{last * i // 4:,}</text>',
        ]
    line = " ".join("{:.1f},{:.1f}".format(*at(*point)) for point in points)
    shapes.append(f'<polyline points="{line}" fill="none" stroke="{COLOURS[0]}" stroke-width="2"/>')
    size = f'width="{_LEFT + _WIDTH + 40}" height="{_HEIGHT + _BELOW}"'
    picture = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">{"".join(shapes)}</svg>'
    rows = "".join(
        f'<tr><td class="n">{step:,}</td><td class="n">{step * curve.step_tokens:,}</td>'
        f'<td class="n">{curve(step):.4e}</td></tr>'
        for step in curve.borders()
    )
    heads = "".join(
        f'<th class="n">{h}</th>' for h in ("step", "tokens before it", "learning rate")
    )
    title = escape(f"Learning rate of {curve.title}")
    return html_page(title, [f"<h1>{title}</h1>{picture}<table><tr>{heads}</tr>{rows}</table>"])
