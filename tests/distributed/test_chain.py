"""Nonlinear recurrences over ranks are those over the whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from rondo.tests.distributed.chain_cases import CHAINS, chain_over_ranks, work_overlaps
from rondo.tests.distributed.spawn import run_ranks


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("ranks", "time"), [(2, 1), (2, 7), (4, 4)])
def test_over_ranks_equals_the_whole(name: str, ranks: int, time: int, batch: int) -> None:
    """Outputs, state and every gradient, with documents and a carried state, in parts of heads
    (one row) and of rows; stretches that end inside chunks."""
    for worst in run_ranks(chain_over_ranks, ranks, name, batch, time):
        assert len(worst) == 4
        assert not {case: error for case, error in worst.items() if not error < 1e-11}


@pytest.mark.parametrize("name", CHAINS)
def test_ranks_work_at_the_same_time(name: str, tmp_path: Path) -> None:
    """One on a part, the next on the part before, forward and backward."""
    for done in run_ranks(work_overlaps, 2, name, tmp_path):
        assert done == ["part 0", "part 1"]
