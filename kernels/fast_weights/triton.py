"""Fast weights on a GPU: products stay with the vendor's library, and what stands between them is
one pass of a kernel each (`triton_passes.py`) that keeps nothing but what it was given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from rondo.kernels.fast_weights.chunked import chunked
from rondo.kernels.fast_weights.inner import NORM_EPS, Passes
from rondo.kernels.fast_weights.state import FastWeightState
from rondo.kernels.fast_weights.triton_passes import (
    parts_backward,
    parts_forward,
    read_backward,
    read_forward,
    renew_backward,
    renew_forward,
)
from rondo.kernels.triton_configs import Config
from rondo.kernels.triton_support import Compilation, launch, opaque


def fast_weights(*arguments: Any, **options: Any) -> tuple[Tensor, FastWeightState]:
    """Arguments and results as for `chunked.chunked`."""
    return chunked(*arguments, **options, passes=_PASSES)


def read(a: Tensor, u: Tensor, wide: torch.dtype) -> Tensor:
    """As `inner.read`; float32 inside."""
    return _Read.apply(a, u)


def parts(a: Tensor, u: Tensor, d: Tensor, rates: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `inner.parts`."""
    return _Parts.apply(a, u, d, rates)


def renew(weights: Tensor, step: Tensor, initial: Tensor) -> Tensor:
    """As `inner.renew`."""
    return _Renew.apply(weights, step, initial.square().sum(-1) + NORM_EPS**2)


_PASSES = Passes(read, parts, renew)


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, u: Tensor) -> Tensor:
        ctx.save_for_backward(a, u)
        return _read(a, u)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return _read_backward(*ctx.saved_tensors, grad)


class _Parts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*tensors)
        return _parts(*tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return _parts_backward(*ctx.saved_tensors, *grads)


class _Renew(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights: Tensor, step: Tensor, targets: Tensor) -> Tensor:
        renewed, norms = _renew(weights, step, targets)
        ctx.save_for_backward(renewed, norms, targets)
        return renewed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        at_sum, at_targets = _renew_backward(*ctx.saved_tensors, grad)
        return at_sum, at_sum, at_targets.sum(0)


def _like(x: Tensor, count: int) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for _ in range(count))


@opaque("triton_fast_read", lambda a, u: a.new_empty(a.shape))
def _read(a: Tensor, u: Tensor) -> Tensor:
    """SiLU(a) u in the dtype of a."""
    hidden = a.new_empty(a.shape)
    _over_rows("fast_read", read_forward, (a, u), (hidden,))
    return hidden


@opaque("triton_fast_read_backward", lambda a, u, grad: _like(a, 2))
def _read_backward(a: Tensor, u: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    at_a, at_u = _like(a, 2)
    _over_rows("fast_read_backward", read_backward, (a, u, grad), (at_a, at_u))
    return at_a, at_u


@opaque("triton_fast_parts", lambda a, u, d, rates: _like(a, 3))
def _parts(a: Tensor, u: Tensor, d: Tensor, rates: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    gate, up, down = _like(a, 3)
    _over_rows("fast_parts", parts_forward, (a, u, d, rates), (gate, up, down))
    return gate, up, down


def _fake_parts_backward(
    a: Tensor, u: Tensor, d: Tensor, rates: Tensor, gate: Tensor, up: Tensor, down: Tensor
) -> tuple[Tensor, ...]:
    return *_like(a, 3), rates.new_empty(rates.shape)


@opaque("triton_fast_parts_backward", _fake_parts_backward)
def _parts_backward(
    a: Tensor, u: Tensor, d: Tensor, rates: Tensor, gate: Tensor, up: Tensor, down: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    at_a, at_u, at_d, at_rates = _fake_parts_backward(a, u, d, rates, gate, up, down)
    given = a, u, d, rates, gate, up, down
    _over_rows("fast_parts_backward", parts_backward, given, (at_a, at_u, at_d, at_rates))
    return at_a, at_u, at_d, at_rates


def _over_rows(
    name: str, kernel: Any, given: tuple[Tensor, ...], found: tuple[Tensor, ...]
) -> None:
    """Every number of rows as wide as the first tensor's."""
    first = given[0]
    width, given = first.shape[-1], tuple(x.contiguous() for x in given)
    rows = first.numel() // max(width, 1)

    def start(config: Config) -> None:
        kernel[(triton.cdiv(rows, config["ROWS"]),)](*given, *found, rows, width, **config)

    _launch(name, "*", first, start)


def _fake_renew(weights: Tensor, step: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    return weights.new_empty(weights.shape), weights.new_empty(weights.shape[:-1])


@opaque("triton_fast_renew", _fake_renew)
def _renew(weights: Tensor, step: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """`(B, H, r, c)`, and the squared norms `(B, H, r)` of the rows; targets `(H, r)`."""
    renewed, norms = _fake_renew(weights, step, targets)
    given = [x.contiguous() for x in (weights, step, targets)]

    def start(config: Config) -> None:
        rows = norms.numel(), targets.numel(), weights.shape[-1]
        renew_forward[(triton.cdiv(rows[0], config["ROWS"]),)](
            *given, renewed, norms, *rows, EPS=NORM_EPS, **_wide(weights), **config
        )

    _launch("fast_renew", _shape(weights), weights, start)
    return renewed, norms


def _fake_renew_backward(
    renewed: Tensor, norms: Tensor, targets: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor]:
    return renewed.new_empty(renewed.shape), norms.new_empty(norms.shape)


@opaque("triton_fast_renew_backward", _fake_renew_backward)
def _renew_backward(
    renewed: Tensor, norms: Tensor, targets: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor]:
    at_sum, at_targets = _fake_renew_backward(renewed, norms, targets, grad)
    given = renewed, targets.contiguous(), norms, grad.contiguous()

    def start(config: Config) -> None:
        rows = norms.numel(), targets.numel(), renewed.shape[-1]
        renew_backward[(triton.cdiv(rows[0], config["ROWS"]),)](
            *given, at_sum, at_targets, *rows, **_wide(renewed), **config
        )

    _launch("fast_renew_backward", _shape(renewed), renewed, start)
    return at_sum, at_targets


def _wide(x: Tensor) -> dict[str, int]:
    return {"WIDTH": triton.next_power_of_2(x.shape[-1])}


def _shape(x: Tensor) -> str:
    return next((f"d{most}" for most in (256, 1024) if x.shape[-1] <= most), "long")


def _launch(name: str, shape: str, like: Tensor, start: Callable[[Config], None]) -> None:
    if like.numel():
        launch(name, shape, like, (like.shape[-1],), start)


def ahead_of_time() -> list[Compilation]:
    """Reads in bfloat16 and float32; rows of matrices of each class."""
    wide = ("a", "u", "d", "rates", "gate", "up", "down", "at_a", "at_u", "at_d", "at_rates")
    wide += ("weights", "step", "targets", "renewed", "norms", "grad", "at_sum", "at_targets")
    types = dict.fromkeys(wide, "*fp32") | dict.fromkeys(("rows", "own", "width"), "i32")
    listed = []
    for kind in ("*bf16", "*fp32"):
        here = types | dict.fromkeys(("a", "u", "hidden", "grad", "at_a", "at_u"), kind)
        listed += [
            Compilation("fast_read", read_forward, here, {}, multiples=("width",)),
            Compilation("fast_read_backward", read_backward, here, {}, multiples=("width",)),
        ]
    listed += [
        Compilation("fast_parts", parts_forward, types, {}, multiples=("width",)),
        Compilation("fast_parts_backward", parts_backward, types, {}, multiples=("width",)),
    ]
    for shape, width in (("d256", 256), ("d1024", 1024), ("long", 8192)):
        for name, kernel, constants in (
            ("fast_renew", renew_forward, {"EPS": NORM_EPS, "WIDTH": width}),
            ("fast_renew_backward", renew_backward, {"WIDTH": width}),
        ):
            listed.append(Compilation(name, kernel, types, constants, shape, ("width",)))
    return listed
