"""The Triton short convolution, in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import itertools

import pytest
import torch

pytest.importorskip("triton")

from rondo.kernels import conv_triton
from rondo.kernels.conv import short_conv
from rondo.kernels.triton_configs import CONFIGS
from rondo.tests.kernels.test_conv import documents, make, run
from rondo.tests.numerics import assert_ratio, gradients

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("y", "state", "dx", "dweight", "dbias", "dstate")


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("short_conv_forward", "short_conv_backward"):
        monkeypatch.setitem(CONFIGS, name, {"*": ({"TIME": 8, "BLOCK": 8},)})
    monkeypatch.setattr(conv_triton, "SHARES", 2)


@pytest.mark.quick
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(
    "time,width,packed,activation",
    [
        *itertools.product((2, 11), (4,), (False, True), ("silu",)),
        (1, 1, True, "silu"),
        (7, 3, True, None),
    ],
)
def test_matches_reference(time: int, width: int, packed: bool, activation: str | None) -> None:
    ids = documents(time).to(DEVICE) if packed else None
    for dtype, limits in ((torch.float32, (1e-5,) * 2), (torch.bfloat16, (5e-3, 8e-3))):
        inputs = [x.to(DEVICE, dtype) for x in make(time, width, channels=9)]
        exact = [x.double() for x in inputs]
        expected, expected_grads = gradients(run("reference", ids, activation), exact)
        actual, actual_grads = gradients(run("triton", ids, activation), inputs)
        assert {x.dtype for x in actual + actual_grads} == {dtype}
        pairs = zip(actual + actual_grads, expected + expected_grads, strict=True)
        for index, (name, (a, e)) in enumerate(zip(NAMES, pairs, strict=True)):
            if width == 1 and "state" in name:
                continue  # has no positions
            assert_ratio(name, a, e, limits[index > 1])


def test_no_bias_float32_weights_and_gaps() -> None:
    x, weight, _, _ = make(10, channels=12)
    x, weight = x.to(DEVICE, torch.bfloat16)[..., ::2], weight[::2].to(DEVICE, torch.float32)

    def call(backend: str):
        return lambda x, w: short_conv(x, w, backend=backend)

    exact = [x.double(), weight.double()]
    expected, expected_grads = gradients(call("reference"), exact)
    actual, actual_grads = gradients(call("triton"), [x, weight])
    assert actual_grads[1].dtype == torch.float32
    for a, e in zip(actual + actual_grads, expected + expected_grads, strict=True):
        assert_ratio("value or gradient", a, e, 8e-3)


def test_traces_without_graph_breaks() -> None:
    inputs = [x.float().to(DEVICE).requires_grad_() for x in make(5)]
    call = run("triton", documents(5).to(DEVICE))
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    actual, expected = compiled(*inputs), call(*inputs)
    torch.testing.assert_close(actual, expected)
    grads = [torch.autograd.grad(sum(y.sum() for y in ys), inputs) for ys in (actual, expected)]
    torch.testing.assert_close(*grads)


def test_refusals() -> None:
    x, weight, _, _ = make(3)
    with pytest.raises(ValueError, match=r"cannot run: it takes float32, .* got float64"):
        short_conv(x, weight, backend="triton")
    with pytest.raises(ValueError, match="at most 16 taps, got 17"):
        short_conv(torch.zeros(1, 3, 2), torch.zeros(2, 17), backend="triton")
