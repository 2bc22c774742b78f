"""tanh in place is tanh."""

from __future__ import annotations

import pytest
import torch

from rondo.kernels.hyperbolic import tanh, tanh_

pytestmark = pytest.mark.quick


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_tanh_to_a_few_roundings(dtype: torch.dtype) -> None:
    """Of each number itself, from the smallest to those without an exponential."""
    sizes = torch.logspace(-30, 30, 4001, dtype=torch.float64)
    x = torch.cat((-sizes, sizes, torch.linspace(-25, 25, 4001))).to(dtype)
    expected = x.double().tanh()
    error = (tanh(x).double() - expected).abs() / expected.abs().clamp(min=1e-300)
    assert error.max() < 4 * torch.finfo(dtype).eps
    assert torch.equal(tanh_(x.clone()), tanh(x, out=torch.empty_like(x)))
    special = torch.tensor([-torch.inf, 0.0, torch.inf, torch.nan], dtype=dtype)
    torch.testing.assert_close(tanh(special), special.tanh(), equal_nan=True, rtol=0, atol=0)
