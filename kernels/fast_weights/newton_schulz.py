"""Orthogonalisation of matrices by a Newton-Schulz iteration, differentiable."""

from __future__ import annotations

import torch
from torch import Tensor

# One quintic a step, as large-chunk test-time training of language models uses them (arXiv
# 2505.23884): the first steps lift small singular values, the last ones settle them near 1.
COEFFICIENTS = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)
EPS = 1e-7


def newton_schulz(x: Tensor) -> Tensor:
    """Matrices with the singular vectors of `x` and singular values near 1.

    `X <- X / sqrt(|X|_F^2 + eps^2)`, then five times `X <- a X + (b A + c A A) X`, `A = X X^T`. A
    singular value of at least 0.0024 |X|_F ends between 0.95 and 1.145 and none ends above; what
    is far below 0.001 |X|_F stays small. The norm is smooth at zero, so that a zero matrix gives
    zero and finite gradients.

    Args:
        x: `(..., rows, columns)`.

    Returns:
        As `x`.
    """
    shape = x.shape
    squares = x.square().sum((-2, -1), keepdim=True)
    x = (x * (squares + EPS**2).rsqrt()).reshape(-1, *shape[-2:])
    tall = shape[-2] > shape[-1]
    if tall:
        x = x.mT
    for a, b, c in COEFFICIENTS:
        gram = torch.bmm(x, x.mT)
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, factor, x, beta=a)
    return (x.mT if tall else x).reshape(shape)
