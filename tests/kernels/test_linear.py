"""Products by oneDNN against those of torch, and their gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rondo.kernels.linear import LEAST, batched_product, linear

pytestmark = [
    pytest.mark.quick,
    pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN"),
]
ROWS, INPUTS, OUTPUTS = (2, 160), 96, 128


def operands() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*ROWS, INPUTS, generator=generator)
    weight = torch.randn(OUTPUTS, INPUTS, generator=generator)
    assert x.numel() * OUTPUTS >= LEAST
    return x.requires_grad_(), weight.requires_grad_()


def test_outputs_and_two_derivatives_equal_those_of_torch() -> None:
    """Those in float64, up to rounding."""
    found, expected = [], []
    for each, function, kind in ((found, linear, None), (expected, F.linear, torch.float64)):
        leaves = [x.detach().to(kind).requires_grad_() for x in operands()]
        y = function(*leaves)
        assert (y.grad_fn.name() == "_LinearBackward") == (function is linear)
        first = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(x.square().sum() for x in first), leaves)
        each += [x.detach() for x in (y, *first, *second)]
    assert all(x.is_contiguous() for x in found[:3])
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=0, atol=1e-5 * float(y.abs().max()))


@pytest.mark.parametrize("case", ["float64", "few", "vector", "autocast", "off"])
def test_torch_does_what_onednn_does_not(case: str) -> None:
    x, weight = operands()
    if case == "float64":
        x, weight = x.double(), weight.double()
    x = {"few": x[:, :1], "vector": x[0, 0]}.get(case, x)
    with (
        torch.autocast("cpu", enabled=case == "autocast"),
        torch.backends.mkldnn.flags(enabled=case != "off"),
    ):
        found, expected = linear(x, weight), F.linear(x, weight)
    assert found.grad_fn.name() != "_LinearBackward"
    assert found.dtype == expected.dtype and torch.equal(found, expected)


def test_operands_with_gaps_in_memory() -> None:
    """oneDNN itself takes seconds for these."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(2, 640, 512, generator=generator)[..., :384].mT
    b = torch.randn(2, 640, 256, generator=generator)[..., ::2].mT
    assert a[0].numel() * b.shape[1] >= LEAST
    expected = a.double() @ b.mT.double()
    found = batched_product(a, b).double()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
