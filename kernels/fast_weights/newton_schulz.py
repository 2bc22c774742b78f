"""Orthogonalisation of matrices by a Newton-Schulz iteration, differentiable."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

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
    x = _Steps.apply(x)
    return (x.mT if tall else x).reshape(shape)


class _Steps(torch.autograd.Function):
    """The steps, of wide matrices `(n, r, c)`. Since A and `F = b A + c A A` are symmetric, a step
    has 4 products backwards, not twice the 3 that it is made of: from G of its result

        of X: a G + F G + (H + H^T) X    H = (b / 2) S + c S A,  S = G X^T + X G^T
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        kept = []
        for a, b, c in COEFFICIENTS:
            gram = torch.bmm(x, x.mT)
            factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
            kept += [x, gram, factor]
            x = torch.baddbmm(x, factor, x, beta=a)
        ctx.save_for_backward(*kept)
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        kept = ctx.saved_tensors
        for i, (a, b, c) in reversed(list(enumerate(COEFFICIENTS))):
            x, gram, factor = kept[3 * i : 3 * i + 3]
            both = torch.bmm(grad, x.mT)
            both = both + both.mT
            half = torch.baddbmm(both, both, gram, beta=b / 2, alpha=c)
            grad = torch.baddbmm(grad, factor, grad, beta=a).baddbmm_(half + half.mT, x)
        return grad
