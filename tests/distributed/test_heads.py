"""Strictly sequential recurrences over ranks are those over the whole."""

from __future__ import annotations

from rondo.kernels.nonlinear_rnn import CELLS
from rondo.tests.distributed.heads_cases import rnn_over_ranks
from rondo.tests.distributed.spawn import run_ranks


def test_cells_over_ranks_equal_the_whole() -> None:
    """Outputs, state and every gradient, with documents and a carried state; heads that ranks
    divide, fewer heads than ranks, and heads that leave some over."""
    heads = [4, 1, 3, 2]
    for worst in run_ranks(rnn_over_ranks, 2, [5, 1, 7, 4], heads):
        assert len(worst) == 4 * len(CELLS) * len(heads)
        assert not {case: error for case, error in worst.items() if not error < 1e-12}


def test_four_ranks() -> None:
    for worst in run_ranks(rnn_over_ranks, 4, [3, 2], [4, 3]):
        assert not {case: error for case, error in worst.items() if not error < 1e-12}
