"""The Triton norms, in Triton's interpreter where there is no GPU, against the reference."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from rondo.kernels.norms import rms_norm
from rondo.tests.kernels.test_norms import CASES, make
from rondo.tests.numerics import assert_ratio, gradients

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.mark.quick
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    "dtype,limits", [(torch.float32, (1e-5,) * 2), (torch.bfloat16, (5e-3, 8e-3))], ids=str
)
def test_matches_reference(case: str, dtype: torch.dtype, limits: tuple[float, float]) -> None:
    function, order = CASES[case]
    for shape in ((2, 7, 3, 20), (4, 5), (1, 300)):
        inputs = [make(*shape)[i].to(DEVICE, dtype) for i in order]
        expected, expected_grads = gradients(function("reference"), [x.double() for x in inputs])
        actual, actual_grads = gradients(function("triton"), inputs)
        assert {y.dtype for y in actual + actual_grads} == {dtype}
        assert_ratio("y", actual[0], expected[0], limits[0])
        for index, (a, e) in enumerate(zip(actual_grads, expected_grads, strict=True)):
            assert_ratio(f"gradient {index}", a, e, limits[1])


def test_rows_with_gaps_and_weights_of_another_dtype() -> None:
    wide, _, weight = make(3, 5, 40)
    wide, weight = wide.to(DEVICE, torch.bfloat16), weight[:16].to(DEVICE, torch.float32)
    for x in (wide[..., 8:24], wide.transpose(0, 2)[..., :3]):
        scale = weight[: x.shape[-1]]
        expected, expected_grads = gradients(
            lambda *i: [rms_norm(*i, backend="reference")], [x.double(), scale.double()]
        )
        leaf, scale = x.detach().requires_grad_(), scale.clone().requires_grad_()
        y = rms_norm(leaf, scale, backend="triton")
        generator = torch.Generator().manual_seed(0)
        up = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(DEVICE)
        grads = torch.autograd.grad(y, (leaf, scale), up.bfloat16())
        assert y.dtype == torch.bfloat16 and grads[1].dtype == torch.float32
        for a, e in zip((y, *grads), (*expected, *expected_grads), strict=True):
            assert_ratio("value or gradient", a, e, 8e-3)


def test_no_rows() -> None:
    x, weight = torch.zeros(0, 8, device=DEVICE), torch.ones(8, device=DEVICE).requires_grad_()
    y = rms_norm(x, weight, backend="triton")
    assert y.shape == x.shape
    assert torch.autograd.grad(y.sum(), weight)[0].tolist() == [0.0] * 8


@pytest.mark.parametrize("case", ("rms", "gated silu False 3"))
def test_traces_without_graph_breaks(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # a compiler makes tensors without values of its own
    function, order = CASES[case]
    inputs = [make(2, 3, 8)[i].float().to(DEVICE).requires_grad_() for i in order]
    run = function("triton")
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    expected, actual = run(*inputs)[0], compiled(*inputs)[0]
    grads = [torch.autograd.grad(y.square().sum(), inputs) for y in (actual, expected)]
    torch.testing.assert_close((actual, *grads[0]), (expected, *grads[1]))


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"cannot run: it takes float32, .* got float64"):
        rms_norm(torch.zeros(2, 8, dtype=torch.float64), backend="triton")
    with pytest.raises(ValueError, match="rows of 1 to 8192 numbers, got 8193"):
        rms_norm(torch.zeros(1, 8193), backend="triton")
