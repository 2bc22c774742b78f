"""`rondo plan --schedule`: a recipe's learning rate on the console, as JSON, or as a page."""

from __future__ import annotations

import math
from html import escape
from typing import Any

from rich.console import Console
from rich.table import Table

from rondo.pretrain.line_chart import html_page, line_chart
from rondo.pretrain.recipe import Recipe, ScheduleConfig
from rondo.pretrain.schedules import INFINITE, phases
from rondo.pretrain.stages import plan_of, rate, stage_at, stages_of, step_tokens

_ROWS = 12
_BLOCKS = " ▁▂▃▄▅▆▇█"


class Curve:
    """The learning rate of a recipe's run."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe, self.stages = recipe, stages_of(recipe)
        self.steps, self.step_tokens = self.stages[-1].end, step_tokens(recipe)
        names = dict.fromkeys(stage.schedule.name for stage in self.stages)
        self.title = (
            f"{recipe.name}: {', '.join(names)}, {self.steps:,} steps of "
            f"{self.step_tokens:,} tokens"
        )

    def __call__(self, step: int) -> float:
        """Learning rate of a step."""
        return self.recipe.optimizer.lr * rate(self.stages, step, self.step_tokens)

    def stage(self, step: int) -> str:
        """Name of the stage of a step; empty in a run without stages."""
        return stage_at(self.stages, step).name

    def samples(self, count: int) -> list[int]:
        """At most `count` steps, evenly spread from the first to the last."""
        last = self.steps - 1
        return sorted({round(i * last / max(1, count - 1)) for i in range(count)})

    def borders(self) -> list[int]:
        """First steps of the phases and of the stages, and the last step."""
        found = {self.steps - 1}
        for stage in self.stages:
            own = _borders(stage.schedule, stage.schedule_steps, self.step_tokens)
            found |= {stage.start} | {stage.schedule_start + step for step in own}
        return sorted(step for step in found if 0 <= step < self.steps)


def _borders(schedule: ScheduleConfig, steps: int, step_tokens: int) -> set[int]:
    """First steps of the phases of a schedule that spans `steps`, and its last step."""
    lengths = phases(schedule, steps, step_tokens)
    found = {0, lengths.warmup, steps - 1}
    if schedule.name in INFINITE:
        found |= {lengths.warmup + lengths.cooldown, steps - lengths.decay}
    if schedule.name.startswith("wsd"):
        found |= {end - lengths.decay for end in lengths.ends} | {*lengths.ends}
        found |= {end - 1 for end in lengths.ends}
    return {step for step in found if 0 <= step < steps}


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
    staged = bool(curve.recipe.stages)
    table = Table("step", "tokens before it", "learning rate", *["stage"] * staged)
    for column in table.columns[:3]:
        column.justify = "right"
    for step in curve.borders():
        cells = (f"{step:,}", f"{step * curve.step_tokens:,}", f"{curve(step):.4e}")
        table.add_row(*cells, *[curve.stage(step)] * staged)
    console.print(table)


def schedule_data(curve: Curve) -> dict[str, Any]:
    """The learning rate at a thousand steps or fewer, for JSON."""
    steps = curve.samples(1001)
    return {
        "steps": curve.steps,
        "tokens_per_step": curve.step_tokens,
        "borders": curve.borders(),
        "stages": plan_of(curve.recipe)["stages"] if curve.recipe.stages else [],
        "step": steps,
        "lr": [curve(step) for step in steps],
    }


def schedule_page(curve: Curve) -> str:
    """An HTML page with the curve, its phases and their learning rates."""
    points = [(step, curve(step)) for step in sorted({*curve.samples(1001), *curve.borders()})]
    marks = [(stage.start, stage.name) for stage in curve.stages if curve.recipe.stages]
    picture = line_chart({"learning rate": points}, marks, last=curve.steps - 1)
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
