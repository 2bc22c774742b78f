"""Whole runs in stages under layouts, on the ranks that are there."""

from __future__ import annotations

from rondo.tests.distributed.engine_cases import KilledTrainer, Rows, train_run

LAYOUTS = {"tp2": "--parallel.tp=2", "pp2": "--parallel.pp=2", "cp2": "--parallel.cp=2"}
EXPERTS = {
    "ep2": [
        "--parallel.ep=2",
        "--model.pattern=[gated_deltanet+moe, attention]",
        "--model.ffns.moe={num_experts: 4, top_k: 2}",
    ]
}
"""On two data-parallel ranks."""


class KilledInSecond(KilledTrainer):
    """Does not live to see the end of the fourth step of the second stage."""

    LAST = 7


def staged(options: list[str]) -> tuple[dict[str, Rows], dict[str, Rows]]:
    """Rows of the metrics by layout: of a run, and of one (`<layout>-killed`) that was killed in
    its second stage and went on."""
    whole, resumed = {}, {}
    for name, words in {**{k: [v] for k, v in LAYOUTS.items()}, **EXPERTS}.items():
        whole[name] = train_run([*options, *words, f"--name={name}"])
        again = [*options, *words, f"--name={name}-killed"]
        assert len(train_run(again, KilledInSecond)) == KilledInSecond.LAST
        resumed[name] = train_run(again)
    return whole, resumed
