"""The page around the figures of a report: one HTML file, light or dark, wide or narrow."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass, field

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs


@dataclass
class Panel:
    """A figure, or the HTML of a table."""

    title: str = ""
    figure: go.Figure | None = None
    table: str = ""
    wide: bool = False
    """Takes the whole width of a wide page."""


@dataclass
class Section:
    """Panels under a heading."""

    title: str
    text: str
    """HTML that explains what the panels show."""
    panels: list[Panel] = field(default_factory=list)


def page(title: str, sections: Sequence[Section]) -> str:
    """The HTML of a report. It loads nothing: plotly's script is part of it."""
    drawn: list[str] = []
    body = "".join(_section(section, drawn) for section in sections)
    links = "".join(
        f'<a href="#{_anchor(section)}">{html.escape(section.title)}</a>' for section in sections
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{html.escape(title)}</title>
<style>{_STYLE}</style>
<script>{get_plotlyjs()}</script></head>
<body><main><h1>{html.escape(title)}</h1><nav>{links}</nav>
{body}</main>
<script>const FIGURES = [{",".join(drawn)}];
{_SCRIPT}</script></body></html>
"""


def _section(section: Section, drawn: list[str]) -> str:
    panels = "".join(_panel(panel, drawn) for panel in section.panels)
    return (
        f'<section id="{_anchor(section)}"><h2>{html.escape(section.title)}</h2>'
        f'<p>{section.text}</p><div class="panels">{panels}</div></section>\n'
    )


def _panel(panel: Panel, drawn: list[str]) -> str:
    title = f"<h3>{html.escape(panel.title)}</h3>" if panel.title else ""
    content = f'<div class="table">{panel.table}</div>'
    if panel.figure is not None:
        content = f'<div class="figure" id="figure-{len(drawn)}"></div>'
        # Nothing in a name or a recipe may end the script.
        drawn.append(str(panel.figure.to_json()).replace("<", "\\u003c"))
    return f'<div class="panel{" wide" if panel.wide else ""}">{title}{content}</div>'


def _anchor(section: Section) -> str:
    return section.title.lower().replace(" ", "-")


_STYLE = """
:root { --back: #f6f7f9; --panel: #fff; --text: #1f2328; --soft: #59636e; --line: #dfe3e8; }
@media (prefers-color-scheme: dark) {
  :root { --back: #14171b; --panel: #1d2127; --text: #e3e6ea; --soft: #9aa4af; --line: #343a42; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--text);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 16px; }
h1 { font-size: 22px; margin: 8px 0 12px; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 28px 0 4px; }
h3 { font-size: 14px; margin: 0 0 4px; font-weight: 600; overflow-wrap: anywhere; }
p { color: var(--soft); margin: 0 0 12px; max-width: 85ch; }
nav { display: flex; flex-wrap: wrap; gap: 4px 16px; }
nav a { color: var(--soft); }
code { font-size: 90%; }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 460px), 1fr));
  gap: 14px; }
.panel { background: var(--panel); border: 1px solid var(--line); border-radius: 8px;
  padding: 12px; min-width: 0; }
.wide { grid-column: 1 / -1; }
.figure { height: 320px; }
.table { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px; }
th, td { text-align: left; padding: 4px 14px 4px 0; vertical-align: top; white-space: nowrap; }
td.long { white-space: normal; min-width: 30ch; max-width: 46ch; overflow-wrap: anywhere; }
th { color: var(--soft); font-weight: 500; border-bottom: 1px solid var(--line); }
"""

_SCRIPT = """
const dark = matchMedia("(prefers-color-scheme: dark)");
function colours(layout) {
  const style = getComputedStyle(document.documentElement);
  const text = style.getPropertyValue("--soft").trim();
  const line = style.getPropertyValue("--line").trim();
  const panel = style.getPropertyValue("--panel").trim();
  const axis = {gridcolor: line, linecolor: line, zerolinecolor: line, tickcolor: line,
    showgrid: true, zeroline: false};
  const hover = {bgcolor: panel, bordercolor: line, font: {color: text}};
  return {...layout, font: {color: text, size: 12, family: "inherit"}, hoverlabel: hover,
    xaxis: {...axis, ...layout.xaxis}, yaxis: {...axis, ...layout.yaxis}};
}
function draw() {
  FIGURES.forEach((figure, index) => Plotly.react("figure-" + index, figure.data,
    colours(figure.layout), {responsive: true, displayModeBar: false}));
}
draw();
dark.addEventListener("change", draw);
"""
