"""RMS norm, L2 norm and gated RMS norm by Triton kernels; see `norms_triton_kernels.py`."""

from __future__ import annotations

import itertools
from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from rondo.kernels.norms_triton_kernels import norm_backward, norm_forward
from rondo.kernels.triton_configs import Config
from rondo.kernels.triton_support import Compilation, launch, opaque, resident_programs

PLAIN, NORM_THEN_GATE, GATE_THEN_NORM = range(3)


def triton_norm(x: Tensor, weight: Tensor | None, eps: float, count: int) -> Tensor:
    """`x * rsqrt(sum(x^2) / count + eps) * weight`; see `rms_norm`."""
    return _Norm.apply(x, None, weight, eps, count, PLAIN, False)


def triton_gated_norm(
    x: Tensor, gate: Tensor, weight: Tensor | None, eps: float, silu: bool, norm_before_gate: bool
) -> Tensor:
    """See `gated_rms_norm`."""
    order = NORM_THEN_GATE if norm_before_gate else GATE_THEN_NORM
    return _Norm.apply(x, gate, weight, eps, x.shape[-1], order, silu)


class _Norm(torch.autograd.Function):
    """Saves the inputs and the inverse norm of each row."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gate: Tensor | None,
        weight: Tensor | None,
        eps: float,
        count: int,
        order: int,
        silu: bool,
    ) -> Tensor:
        y, inverses = _forward(x, gate, weight, eps, count, order, silu)
        ctx.save_for_backward(x, gate, weight, inverses)
        ctx.options = (count, order, silu)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, gate, weight, inverses = ctx.saved_tensors
        grad_x, grad_gate, sums = _backward(grad, x, gate, weight, inverses, *ctx.options)
        grad_weight = None if weight is None else sums.sum(dim=0).to(weight.dtype)
        return grad_x, None if gate is None else grad_gate, grad_weight, None, None, None, None


def _fake_forward(
    x: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    eps: float,
    count: int,
    order: int,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    rows = x.numel() // max(x.shape[-1], 1)
    return x.new_empty(x.shape), x.new_empty(rows, dtype=torch.float32)


@opaque("triton_norm", _fake_forward)
def _forward(
    x: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    eps: float,
    count: int,
    order: int,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    """The result and the inverse norms `(N,)` of the N rows."""
    rows, gates = _rows(x), None if gate is None else _rows(gate)
    y, inverses = _fake_forward(x, gate, weight, eps, count, order, silu)
    if not x.numel():
        return y, inverses.zero_()

    def start(config: Config) -> None:
        norm_forward[(triton.cdiv(len(rows), config["ROWS"]),)](
            rows, gates, weight, y, inverses, len(rows), rows.stride(0), _stride(gates), eps,
            **_constants(x.shape[-1], count, order, silu), **config,
        )  # fmt: skip

    launch(_name(order, "forward"), _shape(x.shape[-1]), x, (x.shape[-1],), start)
    return y, inverses


def _fake_backward(
    grad: Tensor,
    x: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    inverses: Tensor,
    count: int,
    order: int,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    programs = 0 if weight is None else resident_programs(x.device)
    sums = x.new_empty(programs, x.shape[-1], dtype=torch.float32)
    return x.new_empty(x.shape), x.new_empty(x.shape if gate is not None else 0), sums


@opaque("triton_norm_backward", _fake_backward)
def _backward(
    grad: Tensor,
    x: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    inverses: Tensor,
    count: int,
    order: int,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x and of the gate (empty without one), and sums over some of the rows `(P, D)`
    that add up to the gradient of the weight."""
    grads, rows, gates = _rows(grad), _rows(x), None if gate is None else _rows(gate)
    results = _fake_backward(grad, x, gate, weight, inverses, count, order, silu)
    grad_x, grad_gate, sums = results
    if not x.numel():
        return grad_x, grad_gate, sums.zero_()

    def start(config: Config) -> None:
        norm_backward[(resident_programs(x.device),)](
            grads, rows, gates, weight, inverses, grad_x, None if gate is None else grad_gate,
            None if weight is None else sums, len(rows), grads.stride(0), rows.stride(0),
            _stride(gates), **_constants(x.shape[-1], count, order, silu), **config,
        )  # fmt: skip

    launch(_name(order, "backward"), _shape(x.shape[-1]), x, (x.shape[-1],), start)
    return results


def _rows(x: Tensor) -> Tensor:
    """`(N, D)`, each row without gaps."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _stride(rows: Tensor | None) -> int:
    return 0 if rows is None else rows.stride(0)


def _name(order: int, direction: str) -> str:
    return f"{'rms_norm' if order == PLAIN else 'gated_rms_norm'}_{direction}"


def _shape(dim: int) -> str:
    """The class of row lengths in the table of configurations."""
    return next((f"d{most}" for most in (256, 1024) if dim <= most), "long")


def _constants(dim: int, count: int, order: int, silu: bool) -> dict[str, Any]:
    width = triton.next_power_of_2(dim)
    return {"D": dim, "WIDTH": width, "COUNT": count, "GATE": order, "SILU": silu}


def ahead_of_time() -> list[Compilation]:
    """Norms of the 1.3B and 7B presets' channels, of heads and small models, and with gates, in
    bfloat16 and float32."""
    listed = []
    plain, gated = (128, 1024, 2048, 4096), (128, 1024)
    shapes = [*((dim, PLAIN) for dim in plain), *((dim, NORM_THEN_GATE) for dim in gated)]
    shapes.append((8192, GATE_THEN_NORM))
    for (dim, order), kind in itertools.product(shapes, ("*bf16", "*fp32")):
        constants = _constants(dim, dim, order, True)
        if order == PLAIN:
            constants |= {"gate": None, "grad_gate": None}
        types = dict.fromkeys(("x", "gate", "y", "grad", "grad_x", "grad_gate"), kind)
        types |= dict.fromkeys(("weight", "inverses", "grad_weights"), "*fp32")
        types |= dict.fromkeys(("rows", "x_stride", "gate_stride", "grad_stride"), "i32")
        types |= {"eps": "fp32"}
        for direction, kernel in (("forward", norm_forward), ("backward", norm_backward)):
            names = set(kernel.arg_names)
            here = {k: v for k, v in constants.items() if k in names}
            strides = ("x_stride", "gate_stride", "grad_stride")
            name = _name(order, direction)
            listed.append(Compilation(name, kernel, types, here, _shape(dim), strides))
    return listed
