"""Summaries of the gated delta rule: what a stretch of tokens does to any state."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rondo.kernels.delta_rule import gated_delta_rule, gated_delta_rule_summary
from rondo.kernels.summary import combine
from rondo.tests.kernels.delta_rule_cases import GATES, cast, cut, make
from rondo.tests.numerics import assert_ratio, gradients


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("split", [1, 17, 64, 129])
def test_summaries_compose(gate: str, split: int) -> None:
    args = make(130, gate, groups=1, beta=(0.0, 2.0))
    _, state = gated_delta_rule(**args)
    start = args.pop("initial_state")
    del args["q"]
    whole = gated_delta_rule_summary(**args)
    parts = [gated_delta_rule_summary(**cut(args, *ends)) for ends in ((0, split), (split, 130))]
    joined = combine(*parts)
    for a, b in zip(joined, whole, strict=True):
        assert_ratio("summary", a, b, 1e-10)
    assert_ratio("applied", whole.apply(start), state, 1e-10)


@pytest.mark.parametrize("gate", GATES)
def test_summary_of_documents(gate: str) -> None:
    args = make(100, gate)
    ids = torch.stack([(torch.arange(100) >= 70).long(), torch.zeros(100, dtype=torch.long)])
    _, state = gated_delta_rule(**args, segment_ids=ids)
    start = args.pop("initial_state")
    del args["q"]
    summary = gated_delta_rule_summary(**args, segment_ids=ids)
    assert summary.transition[0].abs().max() == 0 < summary.transition[1].abs().max()
    assert_ratio("applied", summary.apply(start), state, 1e-10)


@pytest.mark.parametrize("gate", GATES)
def test_summary_gradients(gate: str) -> None:
    args = make(70, gate, groups=1)
    start = args.pop("initial_state")
    q = args.pop("q")
    given = {n: x for n, x in args.items() if x is not None}

    def by_summary(*tensors: Tensor) -> list[Tensor]:
        return [gated_delta_rule_summary(**dict(zip(given, tensors, strict=True))).apply(start)]

    def directly(*tensors: Tensor) -> list[Tensor]:
        named = dict(zip(given, tensors, strict=True))
        return [gated_delta_rule(q, **named, initial_state=start, backend="reference")[1]]

    _, grads = gradients(by_summary, list(given.values()))
    _, expected = gradients(directly, list(given.values()))
    for name, a, b in zip(given, grads, expected, strict=True):
        assert_ratio(name, a, b, 1e-10)


@pytest.mark.parametrize("gate", GATES)
def test_summary_in_bfloat16(gate: str) -> None:
    exact = make(200, gate, key=64)
    if gate != "none":
        exact["log_decay"] = exact["log_decay"] / 100
    args = cast(exact, torch.bfloat16)
    del args["q"], args["initial_state"]
    summary = gated_delta_rule_summary(**args)
    expected = gated_delta_rule_summary(**cast(args, torch.float64))
    assert summary.transition.dtype == summary.state.dtype == torch.float32
    assert_ratio("transition", summary.transition, expected.transition, 1e-2)
    assert_ratio("state", summary.state, expected.state, 1e-2)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_transition_does_not_expand(gate: str, dtype: torch.dtype) -> None:
    args = cast(make(130, gate, beta=(1.0, 2.0)), dtype)
    del args["q"], args["initial_state"]
    transition = gated_delta_rule_summary(**args).transition
    assert torch.linalg.matrix_norm(transition, ord=2).max() <= 1 + 1e-5
