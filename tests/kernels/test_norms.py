"""RMS norm, gated RMS norm and L2 norm."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rondo.kernels import tiles
from rondo.kernels.norms import gated_rms_norm, l2_norm, rms_norm
from rondo.tests.numerics import assert_ratio, gradients


def make(*shape: int, seed: int = 0) -> list[Tensor]:
    """x, gate, weight in float64."""
    # Another seed than that of the output gradients: the norm has no gradient along x.
    generator = torch.Generator().manual_seed(seed + 1)
    return [
        torch.randn(s, generator=generator, dtype=torch.float64) for s in (shape, shape, shape[-1:])
    ]


def gated(backend: str, activation: str, before: bool) -> Callable[..., list[Tensor]]:
    return lambda *inputs: [
        gated_rms_norm(*inputs, activation=activation, norm_before_gate=before, backend=backend)
    ]


# name -> (function of a backend, how many of x, gate, weight it takes, in which order)
CASES: dict[str, tuple[Callable, tuple[int, ...]]] = {
    "rms": (lambda b: lambda *i: [rms_norm(*i, backend=b)], (0, 2)),
    "rms without weight": (lambda b: lambda *i: [rms_norm(*i, backend=b)], (0,)),
    "l2": (lambda b: lambda *i: [l2_norm(*i, backend=b)], (0,)),
}
for act, first in itertools.product(("silu", "sigmoid"), (True, False)):
    for order in ((0, 1, 2), (0, 1)):
        CASES[f"gated {act} {first} {len(order)}"] = (
            lambda b, act=act, first=first: gated(b, act, first),
            order,
        )


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("shape", ((1, 1, 8), (2, 7, 3, 5), (4, 1)))
def test_chunked_matches_reference(case: str, shape: tuple[int, ...]) -> None:
    function, order = CASES[case]
    inputs = [make(*shape)[i] for i in order]
    expected, expected_grads = gradients(function("reference"), inputs)
    actual, actual_grads = gradients(function("chunked"), inputs)
    torch.testing.assert_close(actual + actual_grads, expected + expected_grads)


@pytest.mark.parametrize("case", CASES)
def test_by_tiles(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "ROW_TILE", 11)
    test_chunked_matches_reference(case, (2, 7, 3, 5))


@pytest.mark.parametrize("case", CASES)
def test_gradcheck(case: str) -> None:
    function, order = CASES[case]
    inputs = [make(2, 3, 4)[i].requires_grad_() for i in order]
    torch.autograd.gradcheck(function("chunked"), inputs)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    "dtype,limits", [(torch.float32, (1e-5,) * 2), (torch.bfloat16, (5e-3, 8e-3))]
)
def test_low_precision(case: str, dtype: torch.dtype, limits: tuple[float, float]) -> None:
    function, order = CASES[case]
    inputs = [make(2, 50, 64)[i].to(dtype) for i in order]
    expected, expected_grads = gradients(function("reference"), [x.double() for x in inputs])
    actual, actual_grads = gradients(function("chunked"), inputs)
    assert {y.dtype for y in actual + actual_grads} == {dtype}
    assert_ratio("y", actual[0], expected[0], limits[0])
    for index, (a, e) in enumerate(zip(actual_grads, expected_grads, strict=True)):
        assert_ratio(f"gradient {index}", a, e, limits[1])


@pytest.mark.parametrize("case", CASES)
def test_channels_with_one_common_value(case: str) -> None:
    """Where layer norm, which takes the mean away, would leave almost nothing."""
    function, order = CASES[case]
    inputs = [(5 + 0.1 * make(2, 50, 64)[i]).bfloat16() for i in order]
    expected, expected_grads = gradients(function("reference"), [x.double() for x in inputs])
    actual, actual_grads = gradients(function("chunked"), inputs)
    for a, e in zip(actual + actual_grads, expected + expected_grads, strict=True):
        assert_ratio("value or gradient", a, e, 8e-3)


def test_float32_weight_with_bfloat16_input() -> None:
    x, gate, weight = make(4, 16)
    x, gate, weight = x.bfloat16(), gate.bfloat16(), weight.float().requires_grad_()
    for y in (rms_norm(x, weight), gated_rms_norm(x, gate, weight)):
        assert y.dtype == torch.bfloat16
        assert torch.autograd.grad(y.sum(), weight)[0].dtype == torch.float32


def test_transposed_inputs() -> None:
    x, _, weight = make(6, 8)
    for norm in (l2_norm, lambda y: rms_norm(y, weight[:6])):
        wanted = gradients(lambda y, norm=norm: [norm(y)], [x.T.contiguous()])
        turned = gradients(lambda y, norm=norm: [norm(y.T)], [x])
        torch.testing.assert_close(turned[0], wanted[0])
        torch.testing.assert_close(turned[1][0].T, wanted[1][0])


def test_float32_weight_is_not_rounded_on_the_way_back() -> None:
    x, upstream, _ = make(64, 256)
    x, weight = x.bfloat16().requires_grad_(), torch.full((256,), 1 + 2**-9)  # 1 in bfloat16
    actual = torch.autograd.grad(rms_norm(x, weight), x, upstream.bfloat16())[0].double()
    wide = x.detach().double().requires_grad_()
    expected = torch.autograd.grad(rms_norm(wide, weight.double()), wide, upstream)[0]
    share = (actual * expected).sum() / expected.square().sum()
    assert abs(share - 1) < 2**-11


@pytest.mark.parametrize("backend", ("reference", "chunked"))
def test_matches_torch(backend: str) -> None:
    x, gate, weight = make(3, 5, 16)
    plain = F.rms_norm(x, (16,), weight, 1e-6)
    torch.testing.assert_close(rms_norm(x, weight, backend=backend), plain)
    torch.testing.assert_close(
        gated_rms_norm(x, gate, weight, backend=backend), plain * F.silu(gate)
    )
    torch.testing.assert_close(
        gated_rms_norm(x, gate, weight, norm_before_gate=False, backend=backend),
        F.rms_norm(x * F.silu(gate), (16,), weight, 1e-6),
    )
    torch.testing.assert_close(l2_norm(x, eps=0.0, backend=backend), F.normalize(x, dim=-1))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("size", (0.0, 1e12))
def test_extreme_inputs_stay_finite(case: str, size: float) -> None:
    function, order = CASES[case]
    scales = (size, 1.0, 1.0)
    inputs = [make(2, 8)[i].mul(scales[i]).bfloat16() for i in order]
    outputs, grads = gradients(function("chunked"), inputs)
    assert all(y.isfinite().all() for y in outputs + grads)


def test_inputs_are_left_alone() -> None:
    x, gate, weight = (z.requires_grad_() for z in make(3, 8))
    copies = [z.detach().clone() for z in (x, gate, weight)]
    for before in (True, False):
        y = gated_rms_norm(x, gate, weight, norm_before_gate=before) + rms_norm(x, weight)
        upstream = torch.ones_like(y)
        y.backward(upstream)
        assert torch.equal(upstream, torch.ones_like(y))
    assert all(torch.equal(a, b) for a, b in zip((x, gate, weight), copies, strict=True))


@pytest.mark.parametrize("case", CASES)
def test_traces_without_graph_breaks(case: str) -> None:
    torch.compiler.reset()
    function, order = CASES[case]
    inputs = [make(2, 3, 8)[i].requires_grad_() for i in order]
    run = function("chunked")
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    expected, actual = run(*inputs)[0], compiled(*inputs)[0]
    grads = [torch.autograd.grad(y.square().sum(), inputs) for y in (actual, expected)]
    torch.testing.assert_close((actual, *grads[0]), (expected, *grads[1]))


def test_invalid_inputs() -> None:
    x = torch.zeros(2, 8)
    with pytest.raises(ValueError, match=r"rms_norm: weight \(7,\) must be \(8,\)"):
        rms_norm(x, torch.ones(7))
    with pytest.raises(ValueError, match="l2_norm: eps must not be negative, got -1"):
        l2_norm(x, eps=-1)
    with pytest.raises(ValueError, match=r"gate \(2, 7\) must have the shape of x \(2, 8\)"):
        gated_rms_norm(x, torch.zeros(2, 7))
    with pytest.raises(ValueError, match="one of silu, sigmoid, got 'gelu'"):
        gated_rms_norm(x, x, activation="gelu")
    with pytest.raises(ValueError, match="backend 'flash' is not available"):
        rms_norm(x, backend="flash")
