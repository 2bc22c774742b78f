"""What a run that starts from another's checkpoint may lack there or leave there, by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rondo.parallel.checkpoint import Checkpointer, CheckpointError
from rondo.parallel.checkpoint.changes import changes

pytestmark = pytest.mark.quick


def names(trained: str, extra: str = "") -> dict[str, set[str]]:
    """A model of parameters a, b and `extra`, of which some are trained."""
    state = {f"{parameter}.{key}" for parameter in trained for key in ("exp_avg", "step")}
    return {"model": {"a", "b", *extra}, "optimizer": state}


def test_equal_runs_differ_in_nothing() -> None:
    found = changes(names("ab", "x"), names("ab", "x"), {"x"})
    assert not any(found.fresh.values()) and not any(found.dropped.values())
    assert str(found) == ""


def test_optional_buffers_and_state_of_parameters() -> None:
    found = changes(names("ab", "x"), names("b", "y"), {"x", "y"})
    assert found.fresh == {"model": {"y"}, "optimizer": set()}
    assert found.dropped == {"model": {"x"}, "optimizer": {"a.exp_avg", "a.step"}}
    assert str(found) == "begins fresh: y; left behind: x, optimizer state of a"
    back = changes(names("b", "y"), names("ab", "x"), {"x", "y"})
    assert (back.fresh, back.dropped) == (found.dropped, found.fresh)


def test_nothing_else_may_differ() -> None:
    """A tensor that is not optional, or other state of the same parameter (another optimizer)."""
    other = {"model": {"a", "b"}, "optimizer": {"a.momentum", "b.exp_avg", "b.step"}}
    for stored, wanted in ((names("ab", "z"), other), (other, names("ab", "z"))):
        found = changes(stored, wanted, {"x"})
        assert not any(found.fresh.values()) and not any(found.dropped.values())


def test_what_is_dropped_may_be_stored_and_nothing_else(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path, keep=0, asynchronous=False)
    kept, more = torch.ones(3), torch.ones(2)
    checkpointer.save(1, {"model": {"kept": kept, "more": more, "most": more}}, {})
    path, new = checkpointer.newest(), {"model": {"kept": torch.zeros(3)}}
    with pytest.raises(CheckpointError, match=r"more .* is not expected; most"):
        checkpointer.load(path, new)
    with pytest.raises(CheckpointError, match=r"most .* is not expected"):
        checkpointer.load(path, new, dropped={"model": {"more"}})
    checkpointer.load(path, new, dropped={"model": {"more", "most"}})
    assert torch.equal(new["model"]["kept"], kept)
