"""Newton's method over ranks finds what it finds in one process."""

from __future__ import annotations

import pytest

from rondo.tests.distributed.newton_cases import exchanges, newton_over_ranks, not_a_number
from rondo.tests.distributed.spawn import run_ranks


@pytest.mark.parametrize(("ranks", "lengths"), [(2, [1, 7]), (4, [4])])
def test_newton_over_ranks_equals_the_whole(ranks: int, lengths: list[int]) -> None:
    """Outputs, state and every gradient; documents that begin at each border or span all ranks, a
    carried state, and rows for which the method fails."""
    for worst in run_ranks(newton_over_ranks, ranks, lengths):
        assert len(worst) == 10 * len(lengths)
        assert not {case: error for case, error in worst.items() if not error < 1e-10}


def test_an_iteration_is_one_exchange() -> None:
    """And one more for the guess, one for the sweep that confirms the solution, one backward."""
    for iterations, forward, backward in run_ranks(exchanges, 2, 40):
        assert iterations > 0
        assert (forward, backward) == (iterations + 2, 1)


def test_what_is_not_a_number_is_not_a_solution() -> None:
    """All ranks notice, whichever has it, and the layer counts once."""
    assert run_ranks(not_a_number, 2) == [(1, True, 1), (1, True, 1)]
