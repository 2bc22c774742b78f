"""Lines over the steps of a run, as a picture (SVG) for an HTML page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from rondo.parallel.plan.page import COLOURS, html_page

__all__ = ["html_page", "line_chart"]

_WIDTH, _HEIGHT, _LEFT, _BELOW = 900, 320, 70, 40
"""The plot in pixels, and the room beside and below it."""


def line_chart(
    lines: Mapping[str, Sequence[tuple[int, float]]],
    marks: Sequence[tuple[int, str]] = (),
    *,
    last: int,
    low: float = 0.0,
    form: str = ".2e",
    ticks: Sequence[int] | None = None,
) -> str:
    """A picture of `lines`, by name, of (step, value) from step 0 to `last`.

    Args:
        marks: steps at which something begins, and its name.
        low: the lowest value of the scale; the highest is that of the lines.
        form: how values of the scale are written.
        ticks: steps whose numbers are written; None: five, evenly apart.
    """
    top = max(value for points in lines.values() for _, value in points)
    last, span = max(1, last), (top - low) or 1.0

    def at(step: float, value: float) -> tuple[float, float]:
        return _LEFT + _WIDTH * step / last, 10 + _HEIGHT * (1 - (value - low) / span)

    shapes = []
    for i in range(5):
        value = low + span * i / 4
        _, y = at(0, value)
        shapes += [
            f'<line x1="{_LEFT}" x2="{_LEFT + _WIDTH}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>',
            f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:{form}}</text>',
        ]
    for step in [last * i // 4 for i in range(5)] if ticks is None else ticks:
        x, _ = at(step, low)
        place = f'x="{x:.1f}" y="{_HEIGHT + 28}" text-anchor="middle"'
        shapes.append(f"<text {place}>{step:,}</text>")
    for step, name in marks:
        x, _ = at(step, low)
        shapes += [
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="10" y2="{_HEIGHT + 10}" stroke="#999" '
            'stroke-dasharray="4"/>',
            f'<text x="{x + 4:.1f}" y="22">{escape(name)}</text>',
        ]
    for number, points in enumerate(lines.values()):
        path = " ".join("{:.1f},{:.1f}".format(*at(*point)) for point in points)
        colour = COLOURS[number % len(COLOURS)]
        shapes.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
    width, height = _LEFT + _WIDTH + 40, _HEIGHT + _BELOW
    size = f'viewBox="0 0 {width} {height}" style="width:100%;max-width:{width}px;height:auto"'
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">{"".join(shapes)}</svg>'
    return svg + (_legend([*lines]) if len(lines) > 1 else "")


def _legend(names: Sequence[str]) -> str:
    items = (
        f'<span class="item"><span class="key" style="background:'
        f'{COLOURS[number % len(COLOURS)]}"></span>{escape(name)}</span>'
        for number, name in enumerate(names)
    )
    return f'<p class="legend">{"".join(items)}</p>'
