"""The Triton passes of fast weights, in the interpreter where there is no GPU, against the
reference."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from rondo.kernels import fast_weights
from rondo.kernels.fast_weights import FastWeights, inner, triton
from rondo.kernels.triton_configs import CONFIGS
from rondo.tests.kernels.fast_weights_cases import HIDDEN, Case, V, gradients, make
from rondo.tests.numerics import assert_ratio

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several programs, and several tiles of a token, the last of each not full."""
    for name in ("fast_read", "fast_read_backward", "fast_parts", "fast_parts_backward"):
        monkeypatch.setitem(CONFIGS, name, {"*": ({"ROWS": 8, "BLOCK": 4},)})
    for name in ("fast_renew", "fast_renew_backward"):
        monkeypatch.setitem(CONFIGS, name, {"*": ({"ROWS": 8},)})


def moved(case: Case, dtype: torch.dtype | None = None) -> Case:
    """On the device, and in another dtype."""
    case = case.rebuilt([x.to(DEVICE, dtype) for x in case.tensors()])
    state = case.state and case.state._replace(count=case.state.count.to(DEVICE))
    return case._replace(state=state, ids=None if case.ids is None else case.ids.to(DEVICE))


def check(case: Case, limit: float, **options: Any) -> None:
    """Outputs, states and every gradient against the float64 reference of the same numbers."""
    case, exact = moved(case), moved(case, torch.float64)
    found = gradients(functools.partial(case.flat, backend="triton", **options), case.tensors())
    expected = gradients(
        functools.partial(exact.flat, backend="reference", **options), exact.tensors()
    )
    assert found[0][0].dtype == case.v.dtype
    pairs = zip(found[0] + found[1], expected[0] + expected[1], strict=True)
    for number, (x, y) in enumerate(pairs):
        assert_ratio(f"result {number}", x, y, limit)


@pytest.mark.quick
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_matches_reference(dtype: torch.dtype) -> None:
    case = make(7, documents=0.2, dtype=dtype)
    check(case, LIMITS[dtype], update="gradient", chunk_size=3)


@pytest.mark.quick
def test_carried_state_and_orthogonal_steps() -> None:
    case = make(6, dtype=torch.float32, open_tokens=(2, 0))
    check(case, 1e-4, update="muon", chunk_size=3, order="update_then_apply")


@pytest.mark.quick
def test_factors_of_the_sums() -> None:
    """Steep and shut units, in a row that is not full, against automatic differentiation."""
    generator = torch.Generator().manual_seed(0)
    a, u, d = (4 * torch.randn(3, 2, 7, generator=generator) for _ in range(3))
    a[0] *= 5
    rates = torch.rand(3, 2, 3, generator=generator)
    inputs = [x.to(DEVICE) for x in (a, u, d, rates)]
    found = gradients(triton.parts, inputs)
    expected = gradients(inner.parts, [x.double() for x in inputs])
    for x, y in zip(found[0] + found[1], expected[0] + expected[1], strict=True):
        assert_ratio("factor", x, y, 1e-5)


@pytest.mark.quick
def test_rows_of_zero_keep_finite_gradients() -> None:
    """A row of zeros, one far below eps, and rows to be made so."""
    weights, step, initial = torch.randn(3, 2, 4, 9, generator=torch.Generator().manual_seed(0))
    weights[:, 0], step[:, 0] = 0.0, 0.0
    weights[:, 1], step[:, 1] = 1e-20, 1e-22
    initial[:, 2] = 0.0
    inputs = [x.to(DEVICE) for x in (weights.expand(2, -1, -1, -1), step[None] + 0, initial)]
    inputs[1] = inputs[1].repeat(2, 1, 1, 1)
    found = gradients(lambda *x: [triton.renew(*x)], inputs)
    expected = gradients(lambda *x: [inner.renew(*x)], [x.double() for x in inputs])
    for x, y in zip(found[0] + found[1], expected[0] + expected[1], strict=True):
        assert x.isfinite().all()
        assert_ratio("row", x, y, 1e-5)


def test_traces_without_graph_breaks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # a compiler makes tensors without values of its own
    case = moved(make(4, dtype=torch.float32))
    run = functools.partial(case.flat, chunk_size=3, backend="triton", update="gradient")
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    results = [gradients(f, case.tensors()) for f in (compiled, run)]
    for x, y in zip(*(o + g for o, g in results), strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.quick
def test_refusals() -> None:
    case = make(2)
    with pytest.raises(ValueError, match=r"it takes float32, .* got float64"):
        case.run(backend="triton")
    wide = FastWeights(
        torch.zeros(2, HIDDEN, 8193), torch.zeros(2, HIDDEN, 8193), torch.zeros(2, V, HIDDEN)
    )
    keys = torch.zeros(1, 1, 2, 8193)
    with pytest.raises(ValueError, match="at most 8192 numbers, got 8193"):
        fast_weights(
            keys, keys, torch.zeros(1, 1, 2, V), torch.zeros(1, 1, 2, 3), wide, backend="triton"
        )
