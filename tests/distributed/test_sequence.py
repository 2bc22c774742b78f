"""Sequence parallel: operators over ranks are operators over the whole, at a fixed volume."""

from __future__ import annotations

import pytest
import torch

from rondo.parallel.sequence import over_ranks
from rondo.tests.distributed.sequence_cases import (
    bytes_of_layers,
    halves_and_whole,
    operators_over_ranks,
)
from rondo.tests.distributed.spawn import run_ranks

DIM, HEADS, WIDTH = 128, 2, 64
STATE = HEADS * WIDTH * WIDTH
# Mixer, options, numbers in a summary (transition and state).
SUMMARIES = [
    ("gated_deltanet", {"num_heads": HEADS, "head_dim": WIDTH, "expand_v": 1.0}, 2 * STATE),
    ("gla", {"num_heads": HEADS, "expand_k": 1.0}, STATE + HEADS * WIDTH),
    ("retnet", {"num_heads": HEADS, "expand_v": 1.0}, STATE + HEADS),
    ("mamba2", {"expand": 1, "head_dim": WIDTH, "state_dim": WIDTH}, STATE + HEADS),
]


@pytest.mark.parametrize("exchange", ["all_gather", "ring"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_operators_over_ranks_equal_the_whole(ranks: int, exchange: str) -> None:
    """Outputs, states and every gradient, with documents and carried state; stretches longer and
    shorter than a convolution's history."""
    for worst in run_ranks(operators_over_ranks, ranks, [1, 2, 9, 70], exchange):
        wrong = {case: error for case, error in worst.items() if not error < 1e-11}
        assert not wrong
        assert len(worst) == 4 * 10 * 4


def test_an_exchange_is_under_way_while_the_other_half_is_computed() -> None:
    """Forward and backward; and halves are the whole."""
    for worst, events in run_ranks(halves_and_whole, 2, 9):
        assert len(worst) == 2 * 9
        assert not {case: error for case, error in worst.items() if not error < 1e-12}
        forward = ["start", "start", "end", "forward", "end", "forward"]
        assert events == [*forward, "backward", "start", "backward", "start", "end", "end"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_do_not_depend_on_the_length(dtype: torch.dtype) -> None:
    """And are those of the summaries: (P - 1) float32 summaries forward and as many backward."""
    lengths, ranks = [1024, 8192, 65536] if dtype == torch.bfloat16 else [1024, 8192], 2
    cases = [(mixer, options) for mixer, options, _ in SUMMARIES]
    arguments = (cases, DIM, lengths, dtype, "all_gather")
    for of_rank in run_ranks(bytes_of_layers, ranks, *arguments, timeout=300):
        for (mixer, _, numbers), found in zip(SUMMARIES, of_rank, strict=True):
            formula = 4 * (ranks - 1) * numbers
            for here in found:  # two halves of a long stretch send a document's bounds twice
                assert abs(here["all_gather"] - found[0]["all_gather"]) <= 16, mixer
                assert formula <= here["all_gather"] <= 1.1 * formula, mixer
                assert sum(here.values()) <= 1.1 * 2 * formula, mixer


def test_a_ring_sends_the_state_alone() -> None:
    """Of four ranks the inner ones receive one state forward and its gradient backward, the outer
    ones one of both; beside it only the two bounds of a document."""
    cases = [(mixer, options) for mixer, options, _ in SUMMARIES]
    arguments = (cases, DIM, [64], torch.float32, "ring")
    for rank, of_rank in enumerate(run_ranks(bytes_of_layers, 4, *arguments)):
        states = 2 if rank in (1, 2) else 1
        for (mixer, _, _), (found,) in zip(SUMMARIES, of_rank, strict=True):
            assert found["all_gather"] == found["reduce_scatter"] == 0, mixer
            assert found["receive"] == states * 4 * (STATE + 1), mixer


def test_an_operator_without_a_summary_is_refused() -> None:
    with pytest.raises(ValueError, match="no sequence-parallel form"):
        over_ranks(torch.cumsum, None)
