"""Products by oneDNN against those of torch, and their gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

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


@pytest.mark.parametrize("dims", [(0, None), (None, 0), (0, 0)], ids=str)
def test_transforms_of_functions(dims: tuple[int | None, int | None]) -> None:
    """Outputs, gradients and derivatives along a direction, of every sample, as of torch's
    product."""
    given = [
        y.detach() if dim is None else torch.stack((y.detach(), 1 - y.detach()))
        for y, dim in zip(operands(), dims, strict=True)
    ]
    moved = [y for y, dim in zip(operands(), dims, strict=True) if dim is not None]

    def of(function, kind: torch.dtype) -> list[Tensor]:
        def loss(x: Tensor, weight: Tensor) -> Tensor:
            return function(x, weight).square().sum()

        def along(*pair: Tensor) -> Tensor:
            where = [i for i, dim in enumerate(dims) if dim is not None]

            def of_moved(*some: Tensor) -> Tensor:
                return function(*(some[where.index(i)] if i in where else pair[i] for i in (0, 1)))

            tangents = tuple(y.detach().flip(-1).to(kind) for y in moved)
            return torch.func.jvp(of_moved, tuple(pair[i] for i in where), tangents)[1]

        def all_of_it(*pair: Tensor) -> tuple[Tensor, ...]:
            return function(*pair), *torch.func.grad(loss, (0, 1))(*pair), along(*pair)

        return list(torch.func.vmap(all_of_it, dims)(*(y.to(kind) for y in given)))

    for y, exact in zip(of(linear, torch.float32), of(F.linear, torch.float64), strict=True):
        torch.testing.assert_close(y.double(), exact, rtol=0, atol=1e-5 * float(exact.abs().max()))


def test_its_flops_are_counted() -> None:
    """As torch's own product, forward and backward."""
    counted = []
    for function in (linear, F.linear):
        with FlopCounterMode(display=False) as counter:
            function(*operands()).sum().backward()
        counted.append(counter.get_total_flops())
    assert counted[0] == counted[1] > 0
