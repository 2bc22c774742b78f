"""Attention over ranks equals attention over the whole row."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rondo.tests.distributed.attention_cases import CASES, everything, inputs
from rondo.tests.distributed.spawn import run_ranks

LIMITS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 8e-3}
Results = list[dict[str, Any]]


@pytest.fixture(scope="module", params=[2, 4])
def results(request: pytest.FixtureRequest) -> Results:
    """Of all cases, by rank."""
    return run_ranks(everything, request.param)


@pytest.mark.parametrize("name", CASES)
def test_equals_the_whole_row(results: Results, name: str) -> None:
    limit = LIMITS[CASES[name].dtype]
    for rank, result in enumerate(results):
        for tensor, error in result["errors"][name].items():
            assert error <= limit, f"rank {rank}, {tensor}: {error}"


@pytest.mark.parametrize("name", ["whole", "mixed", "window within", "heads", "heads, mixed"])
def test_a_token_changes_only_what_may_see_it(results: Results, name: str) -> None:
    case = CASES[name]
    changed = torch.cat([result["changed"][name] for result in results], 1)
    at, (_, ids) = case.length + 1, inputs(case, len(results))
    position = torch.arange(changed.shape[1])
    expected = (position >= at).expand(2, -1)
    if case.window is not None:
        expected = expected & (position < at + case.window)
    if ids is not None:
        expected = expected & (ids == ids[:, at : at + 1])
    assert torch.equal(changed, expected)


def test_heads_take_one_exchange_each_way(results: Results) -> None:
    for result in results:
        forward, backward = result["transfers"]["heads"]
        assert forward == {"all_gather": 1, "all_to_all": 2}  # there and back; ids
        assert backward == {"all_to_all": 2}


def test_the_ring_sends_only_what_is_read(results: Results) -> None:
    size = len(results)
    for rank, result in enumerate(results):
        last = rank == size - 1
        # Keys of this rank and of all before it; on the way back their gradients as well, which
        # the last rank sends home.
        sent = 0 if last else rank + 1
        forward, backward = result["transfers"]["ring"]
        assert forward == {"all_gather": 1} | ({"sends": sent} if sent else {})
        assert backward == {"sends": rank if last else 2 * sent}
        # A window of at most a length: to the next rank, and gradients back from it.
        forward, backward = result["transfers"]["window"]
        assert forward["sends"] == (not last)
        assert backward["sends"] == 2 * (not last) + (rank > 0)
        assert result["transfers"]["itself"] == [{}, {}]


def test_refusals_say_why(results: Results) -> None:
    size = len(results)
    for result in results:
        said = result["refusals"]
        assert said["cache"] == (
            "attention: 6 keys for 5 queries: a key/value cache cannot be carried over "
            f"{size} sequence-parallel ranks"
        )
        assert f"ring of {size} ranks (which do not divide 3 query and 3" in said["backend"]
        assert "backend 'flash' is not available; choose one of auto, chunked" in said["backend"]
        assert "must share batch and head dim" in said["shape"]


def test_ranks_of_a_group_are_not_those_of_the_run(results: Results) -> None:
    for result in results:
        for errors in result["subgroups"]:
            assert max(errors.values()) <= 1e-12
