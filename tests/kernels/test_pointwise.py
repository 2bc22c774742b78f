"""SwiGLU and the soft cap."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from rondo.kernels.pointwise import soft_cap, soft_cap_difference_, swiglu
from rondo.tests.numerics import assert_ratio, gradients


def plain(gate: torch.Tensor, up: torch.Tensor) -> list[torch.Tensor]:
    return [F.silu(gate) * up]


def fused(gate: torch.Tensor, up: torch.Tensor) -> list[torch.Tensor]:
    return [swiglu(gate, up)]


@pytest.mark.parametrize(
    "dtype,forward,backward",
    [(torch.float64, 1e-14, 1e-14), (torch.float32, 1e-6, 1e-6), (torch.bfloat16, 5e-3, 5e-3)],
)
def test_matches_plain(dtype: torch.dtype, forward: float, backward: float) -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(3, 50, 7).to(dtype) for _ in range(2)]
    expected, expected_grads = gradients(plain, [x.double() for x in inputs])
    actual, actual_grads = gradients(fused, inputs)
    assert {y.dtype for y in actual + actual_grads} == {dtype}
    assert_ratio("y", actual[0], expected[0], forward)
    for name, a, e in zip(("dgate", "dup"), actual_grads, expected_grads, strict=True):
        assert_ratio(name, a, e, backward)


def test_gradcheck() -> None:
    inputs = [torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    torch.autograd.gradcheck(swiglu, inputs)


def test_large_inputs_stay_finite() -> None:
    gate = torch.tensor([-1e30, -100.0, 0.0, 100.0, 1e30], dtype=torch.bfloat16)
    outputs, grads = gradients(fused, [gate, torch.ones_like(gate)])
    assert all(y.isfinite().all() for y in outputs + grads)


def test_keeps_only_its_inputs() -> None:
    gate, up = (torch.randn(4, 8, requires_grad=True) for _ in range(2))
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        swiglu(gate, up)
    assert {x.data_ptr() for x in saved} == {gate.data_ptr(), up.data_ptr()}


def test_traces_without_graph_breaks() -> None:
    inputs = [torch.randn(3, 4, requires_grad=True) for _ in range(2)]
    compiled = torch.compile(swiglu, fullgraph=True, backend="aot_eager")
    grads = [torch.autograd.grad(f(*inputs).sum(), inputs) for f in (compiled, swiglu)]
    torch.testing.assert_close(*grads)


def test_invalid_inputs() -> None:
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"gate \(2, 3\).*up \(2, 4\)"):
        swiglu(x, torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"float32 and up \(2, 3\) torch.bfloat16"):
        swiglu(x, x.bfloat16())


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16, torch.float16))
def test_soft_cap(dtype: torch.dtype) -> None:
    x = torch.tensor([-1e4, -30.0, -1e-3, 0.0, 2.0, 1e4]).to(dtype)
    actual, exact = soft_cap(x, 30.0), 30 * (x.double() / 30).tanh()
    assert actual.dtype == dtype
    assert_ratio("soft cap", actual, exact, torch.finfo(dtype).eps)
    assert soft_cap(x, None) is x


def test_soft_cap_difference() -> None:
    generator = torch.Generator().manual_seed(0)
    x, shift = (5 * torch.randn(4, 7, dtype=torch.float64, generator=generator) for _ in range(2))
    leaf = x.clone().requires_grad_()
    expected = soft_cap(leaf + shift, 3.0) - soft_cap(shift, 3.0)
    wanted = torch.autograd.grad(expected.sum(), leaf)[0]
    slope = soft_cap_difference_(x, shift, 3.0)
    torch.testing.assert_close((x, slope), (expected.detach(), wanted))
    before = x.clone()
    assert soft_cap_difference_(x, shift, None) is None
    assert torch.equal(x, before)
