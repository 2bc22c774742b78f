"""Inverse of a batch of unit lower triangular matrices, the core of the chunked delta rule."""

from __future__ import annotations

import torch
from torch import Tensor

BASE = 16  # below this size elimination by columns beats small matrix products


def invert_unit_lower(lower: Tensor) -> Tensor:
    """`(I - N)^-1` where `N` is the strictly lower part of `lower`; the rest is ignored.

    Diagonal blocks of 16 are inverted by elimination, then pairs of blocks are merged:
    the lower left block of the inverse is `A22 N21 A11`. Unlike a Neumann series neither step
    cancels large terms, so keys that are all alike cost no accuracy.

    Args:
        lower: `(X, C, C)`, float32 or float64, C a power of two.

    Returns:
        `(X, C, C)`, zero above the diagonal.
    """
    size = lower.shape[-1]
    block = min(BASE, size)
    inverse = torch.zeros_like(lower)
    _diagonal_blocks(inverse, block).copy_(_eliminate(_diagonal_blocks(lower, block)))
    inverse.tril_(-1).diagonal(dim1=1, dim2=2).fill_(1)
    while block < size:
        for start in range(0, size, 2 * block):
            first, second = (slice(at, at + block) for at in (start, start + block))
            left = torch.bmm(lower[:, second, first], inverse[:, first, first])
            inverse[:, second, first] = torch.bmm(inverse[:, second, second], left)
        block *= 2
    return inverse


def _diagonal_blocks(matrix: Tensor, size: int) -> Tensor:
    """View `(X, C / size, size, size)` of the blocks on the diagonal of `(X, C, C)`."""
    count = matrix.shape[-1] // size
    tiles = matrix.unflatten(2, (count, size)).unflatten(1, (count, size))
    return tiles.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)


def _eliminate(blocks: Tensor) -> Tensor:
    """Strictly lower part of the inverses of `I - blocks`; `(X, M, S, S)` in and out.

    The batch is moved innermost, where each step is one long vector operation. Column j is not
    touched before step j, so the work is done in place.
    """
    work = blocks.permute(2, 3, 0, 1).clone(memory_format=torch.contiguous_format)
    for j in range(1, blocks.shape[-1] - 1):
        work[j + 1 :, :j].addcmul_(work[j + 1 :, j : j + 1], work[j : j + 1, :j])
    return work.permute(2, 3, 0, 1)
