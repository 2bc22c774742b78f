"""The chunked linear scan where the state before the row comes later (`kernels.stretch`).

Chunks are scanned from zero once; when the state has come, every position adds the product of the
factors up to it times what entered its chunk. The gradient goes the same way from the far end.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rondo.kernels.scan.chunked import enter, gradients, local, operands, scan
from rondo.kernels.stretch import Steps, stretch
from rondo.kernels.summary import DiagonalSummary, Stretch


def begin_stretch(a: Tensor, b: Tensor, segment_ids: Tensor | None) -> Stretch:
    """Checked arguments of `linear_scan_stretch`."""
    return stretch(_STEPS, DiagonalSummary, operands(a, b, segment_ids), ())


def _begin(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    states, products, transition, state = local(a, b, False)
    return transition, state, states, products


def _finish(first: Tensor, states: Tensor, products: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return enter(states, products, first, b.shape[1], False).to(b.dtype)


def _reverse(first: Tensor, dh: Tensor, h: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    states, products, _, state = local(a, dh, True)
    return state * a[:, 0], states, products, h, first


def _shapes(
    state: Tensor, states: Tensor, products: Tensor, a: Tensor, b: Tensor
) -> tuple[tuple[torch.Size, torch.dtype], ...]:
    return tuple((x.shape, x.dtype) for x in (states, products, b, state))


def _gradients(
    dstate: Tensor | None,
    states: Tensor | None,
    products: Tensor | None,
    h: Tensor | None,
    first: Tensor | None,
    a: Tensor,
    b: Tensor,
) -> tuple[Tensor, Tensor]:
    if states is None or products is None or h is None:  # of the state at the end alone
        met = scan(a, b, None, False).to(b.dtype)
        return gradients(scan(a, torch.zeros_like(b), dstate, True), a, met, None)
    return gradients(enter(states, products, dstate, b.shape[1], True), a, h, first)


_STEPS = Steps(_begin, _finish, _reverse, _gradients, _shapes, kept=2, saved=0, outputs=True)
