"""Operators begun before their initial state is known: two stretches of a row, as two ranks hold
them, against the float64 reference on the whole row."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

pytest.importorskip("triton")

from rondo.kernels import gated_delta_rule, gated_linear_attention
from rondo.kernels.recurrences import STRETCHES
from rondo.parallel.config import Exchange
from rondo.parallel.sequence import over_ranks
from rondo.tests.kernels import delta_rule_cases, test_linear_attention
from rondo.tests.numerics import assert_ratio, gradients

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GATES = ("none", "head", "key")
OPERATORS = {"attention": gated_linear_attention, "delta": gated_delta_rule}
pytestmark = pytest.mark.usefixtures("poisoned_memory")


def operands(name: str, gate: str, time: int) -> list[Tensor]:
    """Tensors of an operator, float64, and last the state before them."""
    if name == "delta":
        made = delta_rule_cases.make(time, gate, batch=2, groups=1, heads=1)
        return [x for x in made.values() if x is not None]
    return test_linear_attention.make(time, gate, heads=(1, 2), dims=(16, 8)).tensors()


def documents(time: int, gate: str) -> Tensor:
    """One that spans the cut and begins and ends inside the stretches; one that begins at it, or
    in its place one that spans the row, whose transitions count."""
    ids = torch.zeros(2, time, dtype=torch.long)
    ids[0, 2:], ids[0, -3:] = 1, 2
    ids[1, time // 2 :] = int(gate == "head")
    return ids.to(DEVICE)


def in_two(
    operator: Callable[..., Any], ids: Tensor | None, *tensors: Tensor
) -> tuple[Tensor, Tensor]:
    """Outputs and the last state of both halves of a row, whose summaries are made first."""
    *given, state = tensors
    state = state.float()
    begin, half = STRETCHES[operator], given[0].shape[1] // 2
    parts = []
    for cut in (slice(None, half), slice(half, None)):
        segments = None if ids is None else ids[:, cut]
        parts.append(
            begin(
                *(x[:, cut] for x in given), segment_ids=segments, chunk_size=16, backend="triton"
            )
        )
    outputs = []
    for i, part in enumerate(parts):
        if i and ids is not None:
            goes_on = ids[:, half - 1] == ids[:, half]
            state = torch.where(goes_on.view(-1, 1, 1, 1), state, 0.0)
        o, state = part.finish(state)
        outputs.append(o)
    return torch.cat(outputs, 1), state


def check(name: str, gate: str, dtype: torch.dtype, time: int, packed: bool, limit: float) -> None:
    operator, ids = OPERATORS[name], documents(time, gate) if packed else None
    exact = [x.to(DEVICE, dtype).double() for x in operands(name, gate, time)]
    whole = functools.partial(operator, segment_ids=ids, backend="reference")
    expected = gradients(lambda *x: whole(*x[:-1], initial_state=x[-1]), exact)
    actual = gradients(functools.partial(in_two, operator, ids), [x.to(dtype) for x in exact])
    assert [x.dtype for x in actual[0]] == [dtype, torch.float32]
    pairs = zip(actual[0] + actual[1], expected[0] + expected[1], strict=True)
    for i, (x, y) in enumerate(pairs):
        assert_ratio(f"{name} {i}", x, y, limit)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("name", OPERATORS)
def test_two_stretches_are_one_row(name: str, gate: str) -> None:
    check(name, gate, torch.float32, 38, packed=gate != "none", limit=1e-5)


@pytest.mark.parametrize("name", OPERATORS)
def test_bfloat16(name: str) -> None:
    check(name, "head", torch.bfloat16, 34, packed=False, limit=8e-3)


@pytest.mark.parametrize("name", OPERATORS)
def test_the_summary_alone(name: str) -> None:
    """A rank may be asked for the gradient of the state it leaves, and of nothing else."""
    operator = OPERATORS[name]
    *given, _ = (x.to(DEVICE).float() for x in operands(name, "head", 18))
    begin = functools.partial(STRETCHES[operator], chunk_size=16, backend="triton")
    actual = gradients(lambda *x: [begin(*x).summary.state], given)
    whole = functools.partial(operator, backend="reference")
    expected = gradients(lambda *x: [whole(*x)[1]], [x.double() for x in given])
    for x, y in zip(actual[0] + actual[1], expected[0] + expected[1], strict=True):
        assert_ratio(name, x, y, 1e-5)


@pytest.mark.parametrize("name", OPERATORS)
def test_traces_without_graph_breaks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # a compiler makes tensors without values of its own
    inputs = [x.to(DEVICE).float() for x in operands(name, "head", 4)]
    run = functools.partial(in_two, OPERATORS[name], None)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    results = [gradients(f, inputs) for f in (compiled, run)]
    for x, y in zip(*(o + g for o, g in results), strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("exchange", ["all_gather", "ring"])
def test_ranks_take_it(exchange: Exchange, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one rank, whose own last state is its first: the operator is not called in one."""
    *given, state = (x.to(DEVICE).float() for x in operands("attention", "head", 18))
    options = {"initial_state": state, "backend": "triton", "chunk_size": 16}
    expected = gated_linear_attention(*given, **options)
    begin, begun = STRETCHES[gated_linear_attention], []
    monkeypatch.setitem(
        STRETCHES, gated_linear_attention, lambda *x, **y: begun.append(1) or begin(*x, **y)
    )
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        run = over_ranks(gated_linear_attention, dist.group.WORLD, exchange)
        torch.testing.assert_close(run(*given, **options), expected)
    finally:
        dist.destroy_process_group()
    assert begun == [1]


@pytest.mark.quick
@pytest.mark.parametrize("name", OPERATORS)
def test_other_backends_have_none(name: str) -> None:
    *given, _ = operands(name, "head", 2)
    assert STRETCHES[OPERATORS[name]](*given) is None
