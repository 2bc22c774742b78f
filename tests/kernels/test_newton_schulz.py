"""The Newton-Schulz iteration against the polar factor of a singular value decomposition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rondo.kernels.fast_weights import newton_schulz


def draw(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.manual_seed(0), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("shape", ((16, 64), (64, 16), (12, 48)))
def test_near_the_polar_factor(shape: tuple[int, int]) -> None:
    """Far from square, every singular value is above 0.0024 of the norm."""
    x = draw(3, 2, *shape)
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    values = u.mT @ newton_schulz(x) @ vh.mT
    diagonal = values.diagonal(0, -2, -1)
    torch.testing.assert_close(values, torch.diag_embed(diagonal), rtol=0, atol=1e-10)
    if not (diagonal.min() >= 0.95 and diagonal.max() <= 1.145):
        raise AssertionError(f"singular values from {diagonal.min()} to {diagonal.max()}")


def test_singular_values_by_their_size() -> None:
    """Share of the norm -> band it ends in, on a matrix with chosen singular values."""
    bands = ((1.0, 0.95, 1.145), (0.1, 0.95, 1.145), (0.0024, 0.95, 1.145), (1.6e-3, 0.7, 1.145))
    bands = (*bands, (6e-4, 0.0, 0.31), (0.0, 0.0, 1e-12))
    u, v = (torch.linalg.qr(draw(8, 8))[0] for _ in range(2))
    for share, low, high in bands:
        sizes = torch.zeros(8, dtype=torch.float64)
        sizes[0], sizes[1] = max(1 - share**2, 0) ** 0.5, share
        values = (u.mT @ newton_schulz(u @ sizes.diag() @ v) @ v.mT).diagonal()
        if not low - 1e-12 <= values[1] <= high + 1e-12:
            raise AssertionError(f"{share} ends at {values[1]}, expected {low} to {high}")


def test_square_matrices_never_exceed_the_band() -> None:
    values = torch.linalg.svdvals(newton_schulz(draw(20, 24, 24)))
    if not values.max() <= 1.145:
        raise AssertionError(f"a singular value of {values.max()}")


def test_tall_is_the_transpose_of_wide() -> None:
    x = draw(2, 5, 9)
    torch.testing.assert_close(newton_schulz(x.mT), newton_schulz(x).mT, rtol=0, atol=0)


@pytest.mark.parametrize("factor", (1e-3, 1e3, 1e12))
def test_scale_does_not_matter(factor: float) -> None:
    x = draw(8, 24, dtype=torch.float32)
    torch.testing.assert_close(newton_schulz(factor * x), newton_schulz(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_zero_stays_zero(dtype: torch.dtype) -> None:
    x = torch.zeros(2, 4, 6, dtype=dtype, requires_grad=True)
    y = newton_schulz(x)
    (grad,) = torch.autograd.grad(y.sum(), x)
    if y.count_nonzero() or not grad.isfinite().all():
        raise AssertionError(f"{y}, {grad}")


def test_gradcheck() -> None:
    for shape in ((3, 5), (5, 3)):
        torch.autograd.gradcheck(newton_schulz, draw(2, *shape).requires_grad_())
