"""Fast weights over ranks that share every chunk are those of one process."""

from __future__ import annotations

import pytest

from rondo.tests.distributed.fast_weights_cases import (
    SETTINGS,
    equal_to_whole,
    refused,
    sums_of_chunks,
    with_some_gradients,
)
from rondo.tests.distributed.spawn import run_ranks


@pytest.mark.parametrize("ranks", [2, 3])
def test_fast_weights_over_ranks_equal_the_whole(ranks: int) -> None:
    """Outputs, state and every gradient; stretches shorter and longer than a chunk, which ranks
    divide or not, documents across them, a state that only the last rank has."""
    lengths = [1, 4, 9]
    for worst in run_ranks(equal_to_whole, ranks, lengths):
        assert len(worst) == len(lengths) * len(SETTINGS)
        assert not {case: error for case, error in worst.items() if not error < 1e-10}


def test_gradients_of_some_inputs() -> None:
    """No rank waits for another that has nothing to add."""
    for worst in run_ranks(with_some_gradients, 3):
        assert len(worst) == 12
        assert not {case: error for case, error in worst.items() if not error < 1e-10}


@pytest.mark.parametrize("length", [6, 10])
def test_a_sum_a_chunk(length: int) -> None:
    """And one for the momenta of all; as many backward."""
    for forward, backward, chunks in run_ranks(sums_of_chunks, 2, length):
        assert forward == chunks + 1
        assert backward == chunks + 1


def test_what_does_not_fit_is_said() -> None:
    for shapes, backend in run_ranks(refused, 2):
        assert "k has shape (2, 3, 2, 4)" in shapes
        assert "fast_weights over 2 ranks: backend 'reference' is not available" in backend
