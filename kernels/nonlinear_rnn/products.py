"""The product of a step: few rows by the same large weights every time.

On a CPU such a product in float32 takes half as long with weights that were laid out for oneDNN
before, which is how `nn.LSTM` has them, as with BLAS and weights as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rondo.kernels.tiles import has_numbers

LEAST = 2**17
"""Weights of a head from which they are laid out anew; fewer stay in the cache as they are."""


class Products:
    """`x Wᵀ` of every head, for `weights` `(H, out, in)` and x `(H, rows, in)`."""

    def __init__(self, weights: Tensor, rows: int) -> None:
        self.transposed = weights.mT
        self.packed: list[Tensor] = []
        if _is_worth_it(weights, rows):
            pack = torch.ops.mkldnn._reorder_linear_weight
            self.packed = [pack(w, rows) for w in weights.contiguous()]

    def __call__(self, x: Tensor) -> Tensor:
        """A new tensor `(H, rows, out)`."""
        if not self.packed:
            return torch.bmm(x, self.transposed)
        linear = torch.ops.mkldnn._linear_pointwise.default
        found = [linear(x[i], w, None, "none", [], "") for i, w in enumerate(self.packed)]
        return torch.stack(found) if len(found) > 1 else found[0].unsqueeze(0)

    def add(self, total: Tensor, x: Tensor) -> None:
        """Adds the products to `total` `(H, rows, out)`, in place."""
        if self.packed:
            total.add_(self(x))
        else:
            torch.baddbmm(total, x, self.transposed, out=total)


def _is_worth_it(weights: Tensor, rows: int) -> bool:
    large = weights[0].numel() >= LEAST and rows > 1
    plain = type(weights) in (Tensor, nn.Parameter) and has_numbers()  # a plan has none
    fits = weights.device.type == "cpu" and weights.dtype == torch.float32
    onednn = torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)
    return large and plain and fits and onednn
