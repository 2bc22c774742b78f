"""Rows of experts and sums of them by Triton kernels: each row is read once and written once.

What a token's rows add up to is summed in float32 in registers, in the order of its slots: no
atomic additions, so that a call gives the same bits every time.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from rondo.kernels.expert_rows.triton_rows import rows_kernel, sums_kernel
from rondo.kernels.triton_configs import Config
from rondo.kernels.triton_support import Compilation, launch, opaque


def gather_rows(x: Tensor, order: Tensor, places: Tensor, drops: bool) -> Tensor:
    """Arguments and result as for the package's `gather_rows`."""
    return _Gather.apply(x, order, places)


def combine_rows(
    y: Tensor, order: Tensor, places: Tensor, weights: Tensor | None, drops: bool
) -> Tensor:
    """Arguments and result as for the package's `combine_rows`."""
    return _Combine.apply(y, order, places, weights)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        rows, _ = _rows(x, order, None, None, places.shape[1])
        return rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (places,) = ctx.saved_tensors
        return _sums(grad, places, None), None, None


class _Combine(torch.autograd.Function):
    """Keeps y only where there are weights, whose gradient needs it."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, order: Tensor, places: Tensor, weights: Tensor | None
    ) -> Tensor:
        kept = (None, None) if weights is None else (y, weights)
        ctx.save_for_backward(order, *kept)
        ctx.k = places.shape[1]
        return _sums(y, places, weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        order, y, weights = ctx.saved_tensors
        dy, dots = _rows(grad, order, weights, y, ctx.k)
        return dy, None, None, None if weights is None else dots.to(weights.dtype)


def _fake_rows(
    x: Tensor, order: Tensor, weights: Tensor | None, y: Tensor | None, k: int
) -> tuple[Tensor, Tensor]:
    shape = (0, k) if weights is None else weights.shape
    return x.new_empty(len(order), x.shape[1]), x.new_zeros(shape, dtype=torch.float32)


@opaque("triton_expert_rows", _fake_rows)
def _rows(
    x: Tensor, order: Tensor, weights: Tensor | None, y: Tensor | None, k: int
) -> tuple[Tensor, Tensor]:
    """`(m, d)` rows of x `(n, d)`, weighted, and the dot products with y `(m, d)` of each choice
    `(n, k)`, 0 for choices without a row; y and weights are both there or neither is."""
    out, dots = _fake_rows(x, order, weights, y, k)
    x, order, weights, y = _contiguous(x, order, weights, y)

    def start(config: Config) -> None:
        rows_kernel[(triton.cdiv(len(order), config["ROWS"]),)](
            x, order, weights, y, out, None if y is None else dots, len(order), len(x),
            D=x.shape[1], K=k, **config,
        )  # fmt: skip

    if out.numel():
        launch("expert_rows", "*", x, (x.shape[1], k), start)
    return out, dots


def _fake_sums(y: Tensor, places: Tensor, weights: Tensor | None) -> Tensor:
    return y.new_empty(len(places), y.shape[1])


@opaque("triton_expert_sums", _fake_sums)
def _sums(y: Tensor, places: Tensor, weights: Tensor | None) -> Tensor:
    """`(n, d)`: sums over the rows of each token."""
    out = _fake_sums(y, places, weights)
    y, places, weights = _contiguous(y, places, weights)

    def start(config: Config) -> None:
        sums_kernel[(triton.cdiv(len(places), config["ROWS"]),)](
            y, places, weights, out, len(places), len(y),
            D=y.shape[1], K=places.shape[1], **config,
        )  # fmt: skip

    if out.numel():
        launch("expert_sums", "*", y, (y.shape[1], places.shape[1]), start)
    return out


def _contiguous(*tensors: Tensor | None) -> Any:
    return [None if x is None else x.contiguous() for x in tensors]


def ahead_of_time() -> list[Compilation]:
    """Rows of the 1.3B preset's width, 2 and 8 experts a token, with weights and without; with
    them in float32 too."""
    listed = []
    for k, weighted, kind in ((2, False, "*bf16"), (8, True, "*bf16"), (8, True, "*fp32")):
        types = dict.fromkeys(("x", "y", "out"), kind)
        types |= {"order": "*i64", "places": "*i64", "weights": "*fp32", "dots": "*fp32"}
        types |= {"rows": "i32", "tokens": "i32"}
        constants = {"D": 2048, "K": k}
        absent = {} if weighted else {"weights": None}
        nothing = {} if weighted else {"weights": None, "y": None, "dots": None}
        listed += [
            Compilation("expert_rows", rows_kernel, types, constants | nothing),
            Compilation("expert_sums", sums_kernel, types, constants | absent),
        ]
    return listed
