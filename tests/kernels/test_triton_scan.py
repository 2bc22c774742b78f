"""The Triton linear scan, in Triton's interpreter where there is no GPU, against the reference."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from triton.runtime.interpreter import ScanOps

from rondo.kernels.scan import linear_scan, linear_scan_stretch, linear_scan_summary, triton_calls
from rondo.kernels.triton_configs import CONFIGS
from rondo.tests.kernels.test_linear_scan import documents, in_two, make, run
from rondo.tests.numerics import assert_ratio, gradients

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.fixture(autouse=True, params=("whole", "chunks"))
def small(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tiles, in rows as they are or cut into chunks."""
    make_small(monkeypatch, request.param)


def make_small(monkeypatch: pytest.MonkeyPatch, rows: str) -> None:
    for name in ("linear_scan", "linear_scan_backward"):
        monkeypatch.setitem(CONFIGS, name, {"*": ({"TIME": 8, "BLOCK": 4},)})
    monkeypatch.setattr(ScanOps, "generic_scan", scan_by_rows)
    monkeypatch.setattr(triton_calls, "PIECE", 8)
    programs = 1 if rows == "whole" else 1000
    monkeypatch.setattr(triton_calls, "resident_programs", lambda device: programs)


def scan_by_rows(self: ScanOps, inputs: list[Any]) -> list[Any]:
    """The interpreter's scan along the first axis, a row at a time in place of a number."""
    dtypes = [x.dtype for x in inputs]
    results = [x.handle.data.copy() for x in inputs]
    for i in range(1, len(results[0])):
        rows = [
            self.to_tensor(x[j].copy(), dtype)
            for j in (i - 1, i)
            for x, dtype in zip(results, dtypes, strict=True)
        ]
        for result, row in zip(results, self.combine_fn.fn(*rows), strict=True):
            result[i] = row.handle.data
    return [self.to_tensor(x, dtype) for x, dtype in zip(results, dtypes, strict=True)]


def check(inputs: list[Tensor], ids: Tensor | None) -> None:
    inputs = [x.to(DEVICE) for x in inputs]
    ids = None if ids is None else ids.to(DEVICE)
    actual = gradients(functools.partial(run, ids=ids, backend="triton"), inputs)
    exact = [x.double() for x in inputs]
    expected = gradients(functools.partial(run, ids=ids, backend="reference"), exact)
    assert [x.dtype for x in actual[0]] == [inputs[1].dtype, torch.float32]
    assert [x.dtype for x in actual[1]] == [x.dtype for x in inputs]
    names = ("h", "last", "da", "db", "dstate")
    pairs = zip(actual[0] + actual[1], expected[0] + expected[1], strict=True)
    for name, (x, y) in zip(names, pairs, strict=False):
        assert_ratio(name, x, y, LIMITS[inputs[0].dtype])


@pytest.mark.quick
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("time", (1, 19))
def test_matches_reference(time: int, dtype: torch.dtype) -> None:
    check(make(time, (3,), dtype), None)


def test_documents() -> None:
    check(make(26, (5,), torch.float32), documents(26, 0.2))
    check(make(26, (), torch.bfloat16)[:2], documents(26, 0.2, seed=1).int())


def test_one_gradient_at_a_time() -> None:
    a, b, state = (x.float().to(DEVICE).requires_grad_() for x in make(9, (2,)))
    for index in range(2):
        y = run(a, b, state, backend="triton")[index].sum()
        expected = run(a, b, state, backend="chunked")[index].sum()
        torch.testing.assert_close(
            torch.autograd.grad(y, (a, b, state)), torch.autograd.grad(expected, (a, b, state))
        )


def test_bfloat16_factors_with_float32_inputs_and_gaps() -> None:
    a, b, state = make(9, (4, 2))
    inputs = [a.bfloat16().to(DEVICE), b.float().to(DEVICE), state.float().to(DEVICE)]
    inputs = [x[..., :1] for x in inputs]
    actual, actual_grads = gradients(functools.partial(run, backend="triton"), inputs)
    exact = [x.double() for x in inputs]
    expected, expected_grads = gradients(functools.partial(run, backend="reference"), exact)
    assert actual_grads[0].dtype == torch.bfloat16
    assert_ratio("da", actual_grads[0], expected_grads[0], 5e-3)
    for x, y in zip(actual + actual_grads[1:], expected + expected_grads[1:], strict=True):
        assert_ratio("result", x, y, 1e-5)


@pytest.mark.parametrize("documented", (False, True))
def test_summary(documented: bool) -> None:
    a, b, _ = (x.float().to(DEVICE) for x in make(17, (3,)))
    a = a * 0.5 + 0.6  # so that the product of all is not zero
    ids = documents(17).to(DEVICE) if documented else None
    summary = functools.partial(linear_scan_summary, segment_ids=ids)
    actual = gradients(functools.partial(summary, backend="triton"), [a, b])
    expected = gradients(functools.partial(summary, backend="chunked"), [a.double(), b.double()])
    for x, y in zip(actual[0] + actual[1], expected[0] + expected[1], strict=True):
        assert_ratio("summary", x, y, 1e-5)


@pytest.mark.parametrize("documented", (False, True))
def test_two_stretches_are_one_row(documented: bool) -> None:
    inputs = [x.to(DEVICE) for x in make(35, (3,), torch.float32)]
    ids = documents(35, 0.05).to(DEVICE) if documented else None
    actual = gradients(functools.partial(in_two, ids=ids, cut=18, backend="triton"), inputs)
    exact = [x.double() for x in inputs]
    expected = gradients(functools.partial(run, ids=ids, backend="reference"), exact)
    for x, y in zip(actual[0] + actual[1], expected[0] + expected[1], strict=True):
        assert_ratio("stretches", x, y, 1e-5)


def test_the_last_state_of_a_stretch_alone() -> None:
    inputs = [x.to(DEVICE) for x in make(17, (3,), torch.float32)[:2]]
    actual = gradients(lambda *x: [linear_scan_stretch(*x, backend="triton").summary.state], inputs)
    expected = gradients(lambda *x: [run(*x, backend="reference")[1]], [x.double() for x in inputs])
    for x, y in zip(actual[0] + actual[1], expected[0] + expected[1], strict=True):
        assert_ratio("state", x, y, 1e-5)


@pytest.mark.parametrize("small", ("chunks",), indirect=True)
def test_a_stretch_launches_what_a_row_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each pass over the positions once; the kernel over chunks alone runs for the summary too."""
    launched: list[str] = []

    class Counted:
        def __init__(self, name: str, kernel: Any) -> None:
            self.name, self.kernel = name, kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            launched.append(self.name)
            return self.kernel[grid]

    for name in ("scan_chunks", "scan_borders", "scan_forward", "scan_backward"):
        monkeypatch.setattr(triton_calls, name, Counted(name, getattr(triton_calls, name)))
    inputs = [x.to(DEVICE) for x in make(19, (3,), torch.float32)]
    whole = ["scan_chunks", "scan_borders", "scan_forward"]
    gradients(functools.partial(run, backend="triton"), inputs)
    assert launched == [*whole, *whole[:2], "scan_backward"]
    launched.clear()
    gradients(lambda a, b, s: linear_scan_stretch(a, b, backend="triton").finish(s), inputs)
    whole.insert(1, "scan_borders")
    assert launched == [*whole, *whole[:3], "scan_backward"]


@pytest.mark.parametrize("form", (run, in_two))
@pytest.mark.parametrize("small", ("whole",), indirect=True)
def test_traces_without_graph_breaks(monkeypatch: pytest.MonkeyPatch, form: Any) -> None:
    monkeypatch.undo()  # a compiler makes tensors without values of its own
    make_small(monkeypatch, "whole")
    inputs = [x.float().to(DEVICE).requires_grad_() for x in make(3, (2,))]
    call = functools.partial(form, backend="triton")
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    (h, last), expected = compiled(*inputs), call(*inputs)
    torch.testing.assert_close((h, last), expected)
    grads = [torch.autograd.grad(y[0].sum() + y[1].sum(), inputs) for y in ((h, last), expected)]
    torch.testing.assert_close(*grads)


def test_refusal() -> None:
    a, b, _ = make(3)
    with pytest.raises(ValueError, match=r"cannot run: it takes float32, .* got float64"):
        linear_scan(a, b, backend="triton")
