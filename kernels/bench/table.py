"""The table and the JSON of what was timed."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

Row = dict[str, Any]
HEADER = (
    "| operator | preset | batch x time | pass | backend | ms | bandwidth | FLOPs "
    "| speed over peers |\n| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
)


def line(row: Row) -> str:
    """A row of the table: times a peer takes are given as a multiple of ours."""
    start = f"| {row['operator']} | {row['preset']} | {row['shape']} | {row['direction']} "
    spent = row["milliseconds"]
    peers = ", ".join(f"{name} {_speed(found, spent)}" for name, found in row["peers"].items())
    if spent is None:
        return f"{start}| | {row['error'].replace('|', '/')} | | | {peers} |"
    shares = f"{row['bandwidth']:.0%} | {row['compute']:.0%}"
    return f"{start}| {row['backend']} | {spent:.3f} | {shares} | {peers} |"


def _speed(found: float | str, ours: float | None) -> str:
    if isinstance(found, str):
        return "-"
    return f"{found:.3f} ms" if ours is None else f"{found / ours:.2f}x"


def write(path: Path, title: str, facts: Row, rows: list[Row], left_out: int) -> None:
    """Writes what was timed so far, and how many cases were not."""
    end = [f"\n{left_out} cases left out: the time was up."] if left_out else []
    keep(
        path,
        "\n".join([title, "", HEADER, *map(line, rows), *end, ""]),
        {**facts, "left_out": left_out, "rows": rows},
    )


def keep(path: Path, text: str, found: Row) -> None:
    """Writes `path`.md and, as JSON, `path`.json, each whole at any time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for suffix, content in ((".md", text), (".json", json.dumps(found, indent=1))):
        part = path.with_suffix(".part")
        part.write_text(content)
        part.replace(path.with_suffix(suffix))


def triton_version() -> str | None:
    """What kernels are compiled by, which may be why they are slow, or wrong; None without it."""
    try:
        return importlib.import_module("triton").__version__
    except ImportError:
        return None
