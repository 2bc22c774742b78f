"""Whole runs in stages under layouts, on the ranks that are there."""

from __future__ import annotations

from rondo.tests.distributed.engine_cases import Rows, train_run

LAYOUTS = {"tp2": "--parallel.tp=2", "pp2": "--parallel.pp=2", "cp2": "--parallel.cp=2"}


def staged(options: list[str]) -> dict[str, Rows]:
    """Rows of the metrics of one run, by layout."""
    return {
        name: train_run([*options, layout, f"--name={name}"]) for name, layout in LAYOUTS.items()
    }
