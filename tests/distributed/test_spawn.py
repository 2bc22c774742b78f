"""The helper that runs ranks reports what goes wrong in one of them."""

from __future__ import annotations

import pytest

from rondo.tests.distributed import spawn_cases as cases
from rondo.tests.distributed.spawn import run_ranks


def test_results_come_by_rank_and_failures_with_their_traceback() -> None:
    assert run_ranks(cases.sum_of_ranks, 2, 10) == [(0, 11), (1, 11)]
    with pytest.raises(AssertionError, match=r"rank 1: (?s:.*)KeyError: 'the cause'"):
        run_ranks(cases.second_raises, 2)
