"""A plan as one HTML page that loads nothing from elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from rondo.parallel.mesh import Layout
from rondo.parallel.plan.estimate import MEMORY_SHARE, Plan
from rondo.parallel.plan.report import (
    GIB,
    PARTS,
    SEARCH_HEADS,
    assumptions,
    collective_rows,
    search_row,
    summary_rows,
    time_parts,
)

COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#999999", "#dd8844")
"""Distinct for colour-blind readers too (Paul Tol's bright scheme, and an orange)."""
CELL = 11
"""Size of a rank in the picture of a layout, pixels."""
SHOWN_NODES = 128
"""Nodes the picture shows at most."""
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem;
       color: #222; background: #fff; }
h1 { font-size: 1.5rem; margin-bottom: 1rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; } td, th { padding: .15rem .8rem .15rem 0; text-align: left; }
th { font-weight: 600; white-space: nowrap; vertical-align: top; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
.key { display: inline-block; width: .8em; height: .8em; margin: 0 .35em 0 0; border-radius: 2px; }
.legend span.item { margin-right: 1.2em; white-space: nowrap; } .note { color: #666; }
svg { display: block; max-width: 100%; height: auto; margin: .5rem 0; } svg text { font: 12px
system-ui, sans-serif; fill: #333; }
"""


def plan_page(plan: Plan, best: Sequence[Plan] = ()) -> str:
    """The page of a plan, and of the best layouts of a search."""
    rows = "".join(
        f"<tr><th>{escape(key)}</th><td>{escape(value)}</td></tr>"
        for key, value in summary_rows(plan)
        if key != "time"  # a picture shows it
    )
    title = f"{plan.job.model.config.preset or 'model'} on {plan.job.ranks} x {plan.hardware.name}"
    body = [
        f"<h1>{escape(title)}</h1><table>{rows}</table>",
        f"<h2>Memory of a rank</h2>{_memory(plan)}",
        f"<h2>Predicted time of a step</h2>{_times(plan)}",
        f"<h2>Layout</h2>{_layout(plan)}",
        f"<h2>Collectives of a rank in a step</h2>{_collectives(plan)}",
    ]
    if best:
        table = _table(SEARCH_HEADS, [search_row(one) for one in best], words=1)
        body.append(f"<h2>Best layouts that fit (predicted)</h2>{table}")
    notes = "".join(f"<li>{escape(text)}</li>" for text in assumptions(plan))
    body.append(
        "<h2>Assumptions</h2><p>Times are predictions, not measurements. They assume:</p>"
        f"<ul>{notes}</ul>"
    )
    return html_page(escape(title), body)


def html_page(title: str, body: Sequence[str]) -> str:
    """A whole page of parts that are HTML already, the title included."""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{_STYLE}</style></head><body>{''.join(body)}</body></html>\n"
    )


def _memory(plan: Plan) -> str:
    """A bar for each pipeline rank, with the GPU's memory as its frame."""
    room = plan.hardware.memory / GIB
    scale = 640 / max(room, *(rank.memory.total / GIB for rank in plan.shown))
    height = 34 * len(plan.shown) + 26
    shapes = []
    for row, rank in enumerate(plan.shown):
        x, y = 90.0, 34 * row + 1
        shapes.append(f'<text x="0" y="{y + 18}">pp rank {rank.pp_rank}</text>')
        for i, (key, name) in enumerate(PARTS.items()):
            size = getattr(rank.memory, key) / GIB
            shapes.append(_box(x, y, size * scale, 26, COLOURS[i], f"{name}: {size:.2f} GiB"))
            x += size * scale
        total = f"{rank.memory.total / GIB:.1f}"
        shapes.append(f'<text x="{min(x + 6, 740):.1f}" y="{y + 18}">{total} GiB</text>')
    frame = f'width="{room * scale:.1f}" height="{height - 24}" fill="none" stroke="#999"'
    shapes.append(f'<rect x="90" y="1" {frame}/>')
    limit = 90 + MEMORY_SHARE * room * scale
    shapes.append(
        f'<line x1="{limit:.1f}" x2="{limit:.1f}" y1="1" y2="{height - 20}" stroke="#333" '
        'stroke-dasharray="4 3"/>'
    )
    words = f"{MEMORY_SHARE:.0%} of {room:.1f} GiB"
    shapes.append(f'<text x="{limit:.1f}" y="{height - 5}" text-anchor="end">{words}</text>')
    names = [
        (COLOURS[i], f"{name} {getattr(plan.worst.memory, key) / GIB:.2f} GiB")
        for i, (key, name) in enumerate(PARTS.items())
    ]
    worst = f'<p class="note">Figures: pp rank {plan.worst.pp_rank}, the fullest.</p>'
    return _svg(820, height, shapes) + _legend(names) + worst


def _times(plan: Plan) -> str:
    parts = time_parts(plan)
    scale, x, shapes = 720 / plan.times.step, 0.0, []
    for i, (name, seconds) in enumerate(parts):
        shapes.append(_box(x, 0, seconds * scale, 26, COLOURS[i], f"{name}: {seconds:.3g} s"))
        x += seconds * scale
    return _svg(720, 28, shapes) + _legend(
        [(COLOURS[i], f"{name} {seconds:.3g} s") for i, (name, seconds) in enumerate(parts)]
    )


def _layout(plan: Plan) -> str:
    """Nodes as frames, ranks as squares: tensor-parallel groups stand together, and colours tell
    apart what differs between ranks first."""
    layout, size = plan.job.layout, plan.hardware.node_size
    by = next((n for n in ("pp", "cp", "tp", "dp_replicate") if getattr(layout, n) > 1), "")
    parts = getattr(layout, by) if by else 1
    colours = [COLOURS[i * min(parts, len(COLOURS)) // parts] for i in range(parts)]
    across = min(size, 8)
    groups = -(-across // min(layout.tp, across))
    width, height = across * (CELL + 1) + 3 * groups + 9, -(-size // across) * (CELL + 1) + 26
    columns = max(1, 920 // (width + 6))
    nodes = -(-plan.job.ranks // size)
    shown, shapes = min(nodes, SHOWN_NODES), []
    for node in range(shown):
        left, top = 1 + node % columns * (width + 6), 1 + node // columns * (height + 6)
        shapes.append(
            f'<rect x="{left}" y="{top}" width="{width}" height="{height}" rx="4" fill="none" '
            f'stroke="#bbb"/><text x="{left + 6}" y="{top + 14}">node {node}</text>'
        )
        for rank in range(node * size, min((node + 1) * size, plan.job.ranks)):
            row, slot = divmod(rank - node * size, across)
            x = left + 6 + slot * (CELL + 1) + slot // min(layout.tp, across) * 3
            place = _place(rank, layout)
            label = f"rank {rank}: " + ", ".join(f"{n} {i}" for n, i in place.items())
            colour = colours[place[by] if by else 0]
            shapes.append(_box(x, top + 20 + row * (CELL + 1), CELL, CELL, colour, label))
    picture = _svg(2 + columns * (width + 6), 2 + -(-shown // columns) * (height + 6), shapes)
    return picture + _key(by, colours) + _layout_note(plan, by, nodes - shown)


def _key(by: str, colours: list[str]) -> str:
    """Which colour is which."""
    names = []
    for colour in dict.fromkeys(colours):
        first, count = colours.index(colour), colours.count(colour)
        last = first + count - 1
        names.append((colour, f"{by} {first}" + (f" to {last}" if count > 1 else "")))
    return _legend(names) if by else ""


def _layout_note(plan: Plan, by: str, hidden: int) -> str:
    layout, size = plan.job.layout, plan.hardware.node_size
    notes = [f"Each frame is a node of {size} GPUs, each square a rank (hold the mouse over it)."]
    if layout.tp > 1:
        notes.append(f"{layout.tp} neighbours make a tensor-parallel group.")
    if not by:
        notes.append("Every rank holds a shard of the same parameters and reads other sequences.")
    if hidden:
        notes.append(f"{hidden} more nodes are laid out alike.")
    return f'<p class="note">{" ".join(notes)}</p>'


def _place(rank: int, layout: Layout) -> dict[str, int]:
    """Where a rank stands along each dimension (`tp` is the fastest)."""
    place = {}
    for name, size in reversed(list(zip(layout._fields, layout, strict=True))):
        rank, place[name] = divmod(rank, size)
    return dict(reversed(place.items()))


def _collectives(plan: Plan) -> str:
    heads = ["collective", "along", "for"]
    for rank in plan.shown:
        heads += [f"count (pp {rank.pp_rank})", f"GB received (pp {rank.pp_rank})"]
    return _table(heads, collective_rows(plan), words=3)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], words: int) -> str:
    """Columns of words, then columns of numbers."""

    def line(cells: Sequence[str], tag: str) -> str:
        kinds = ["" if i < words else ' class="n"' for i in range(len(cells))]
        inner = (f"<{tag}{k}>{escape(c)}</{tag}>" for k, c in zip(kinds, cells, strict=True))
        return f"<tr>{''.join(inner)}</tr>"

    return f"<table>{line(heads, 'th')}{''.join(line(row, 'td') for row in rows)}</table>"


def _box(x: float, y: float, width: float, height: float, colour: str, label: str) -> str:
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(width, 0):.1f}" height="{height}" '
        f'fill="{colour}"><title>{escape(label)}</title></rect>'
    )


def _svg(width: float, height: float, shapes: Sequence[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" role="img">{"".join(shapes)}</svg>'
    )


def _legend(names: Sequence[tuple[str, str]]) -> str:
    items = "".join(
        f'<span class="item"><span class="key" style="background:{colour}"></span>'
        f"{escape(text)}</span> "
        for colour, text in names
    )
    return f'<p class="legend">{items}</p>'
