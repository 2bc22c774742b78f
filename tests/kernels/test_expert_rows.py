"""Rows of experts and sums of them: every backend against the reference in float64. Triton runs in
its interpreter where there is no GPU."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from rondo.kernels import combine_rows, gather_rows
from rondo.tests.numerics import assert_ratio, gradients

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EXPERTS = 5
LIMITS = {torch.float32: 1e-6, torch.bfloat16: 5e-3}
pytestmark = [pytest.mark.quick, pytest.mark.usefixtures("poisoned_memory")]


@pytest.fixture(params=("chunked", "triton"))
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "triton":
        pytest.importorskip("triton")
    return request.param


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def sort(tokens: int, k: int, drops: bool, multiple: int) -> tuple[Tensor, Tensor]:
    """`order` and `places` of random choices, with filling between experts; dropped ones go to
    expert `EXPERTS`."""
    generator = torch.Generator().manual_seed(tokens)
    experts = torch.randint(0, EXPERTS + drops, (tokens * k,), generator=generator)
    order: list[int] = []
    for expert in range(EXPERTS):
        order += (experts == expert).nonzero().flatten().tolist()
        order += [tokens * k] * (-len(order) % multiple)
    places = [order.index(c) if c in order else len(order) for c in range(tokens * k)]
    return torch.tensor(order, device=DEVICE), torch.tensor(places, device=DEVICE).view(-1, k)


CASES = {"even": (7, 2, False, 1), "filled": (9, 3, False, 4), "dropped": (6, 8, True, 4)}


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_rows_match_the_reference(case: str, dtype: torch.dtype, backend: str) -> None:
    order, places = sort(*CASES[case])
    x = draw(len(places), 20).to(DEVICE, dtype)
    real = (order < places.numel())[:, None]

    def run(x: Tensor, **options: Any) -> list[Tensor]:
        y = gather_rows(x, order, places, drops=CASES[case][2], **options)
        return [torch.where(real, y, 0.0), y.detach()]

    def only(x: Tensor, **options: Any) -> list[Tensor]:
        return run(x, **options)[:1]

    expected = gradients(functools.partial(only, backend="reference"), [x.double()])
    actual = gradients(functools.partial(only, backend=backend), [x])
    assert torch.equal(actual[0][0], expected[0][0].to(dtype))
    assert_ratio("dx", actual[1][0], expected[1][0], LIMITS[dtype])
    both = [run(x, backend=name)[1] for name in (backend, "reference")]
    assert torch.equal(*both)


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("weighted", (False, True))
def test_sums_match_the_reference(
    case: str, dtype: torch.dtype, weighted: bool, backend: str
) -> None:
    """Weights of experts in float32 where rows are halves; rows of filling hold infinity."""
    order, places = sort(*CASES[case])
    real = (order < places.numel())[:, None]
    y = torch.where(real, draw(len(order), 20).to(DEVICE, dtype), torch.inf)
    inputs = [y] + ([draw(*places.shape, seed=1).to(DEVICE, torch.float32)] if weighted else [])

    def run(backend: str) -> Callable[..., list[Tensor]]:
        options = {"drops": CASES[case][2], "backend": backend}
        return lambda y, w=None: [combine_rows(y, order, places, w, **options)]

    expected = gradients(run("reference"), [x.double() for x in inputs])
    actual = gradients(run(backend), inputs)
    assert [x.dtype for x in actual[0] + actual[1]] == [dtype, *(x.dtype for x in inputs)]
    assert_ratio("x", actual[0][0], expected[0][0], LIMITS[dtype])
    assert actual[1][0].isfinite().all()
    assert_ratio("dy", torch.where(real, actual[1][0], 0.0), expected[1][0], LIMITS[dtype])
    if weighted:
        assert_ratio("dweights", actual[1][1], expected[1][1], LIMITS[dtype])


def test_gaps_and_nothing(backend: str) -> None:
    order, places = sort(*CASES["even"])
    wide = draw(7, 40).to(DEVICE).float()
    rows = gather_rows(wide[:, ::2], order, places, backend=backend)
    assert torch.equal(rows, wide[:, ::2][order // 2])
    none = torch.empty(0, dtype=torch.long, device=DEVICE)
    nobody = torch.full((7, 2), 0, device=DEVICE)
    leaf = wide.clone().requires_grad_()
    empty = gather_rows(leaf, none, nobody, drops=True, backend=backend)
    sums = combine_rows(empty, none, nobody, drops=True, backend=backend)
    assert empty.shape == (0, 40) and torch.equal(sums, torch.zeros_like(wide))
    assert torch.equal(torch.autograd.grad(sums.sum(), leaf)[0], torch.zeros_like(wide))


def test_traces_without_graph_breaks(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.undo()  # a compiler makes tensors without values of its own
    order, places = sort(*CASES["even"])
    inputs = [draw(7, 8).float().to(DEVICE), draw(7, 2, seed=1).float().to(DEVICE)]

    def run(x: Tensor, weights: Tensor) -> list[Tensor]:
        rows = gather_rows(x, order, places, backend="triton")
        return [combine_rows(rows.square(), order, places, weights, backend="triton")]

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    results = [gradients(f, inputs) for f in (compiled, run)]
    for x, y in zip(*(outputs + grads for outputs, grads in results), strict=True):
        torch.testing.assert_close(x, y)


def test_what_does_not_fit_is_refused() -> None:
    order, places = sort(*CASES["even"])
    x = draw(7, 4)
    for call, words in (
        (lambda: gather_rows(x[:6], order, places), "x has 6 tokens, places 7"),
        (lambda: combine_rows(x, order, places), "y has 7 rows, order 14"),
        (lambda: combine_rows(x[order // 2], order, places, x), r"weights has shape \(7, 4\)"),
        (lambda: gather_rows(x, order.double(), places), "order has shape"),
        (lambda: gather_rows(x, order, places, backend="triton"), "got float64"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
