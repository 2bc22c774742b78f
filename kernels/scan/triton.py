"""The linear scan by Triton kernels (`triton_scan.py`), and its summary from the same ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rondo.kernels.scan.triton_calls import (
    borders,
    chunk_maps,
    contiguous,
    cut_rows,
    enter,
    maps_like,
    scan_gradients,
    scan_outputs,
)
from rondo.kernels.scan.triton_scan import scan_backward, scan_borders, scan_chunks, scan_forward
from rondo.kernels.triton_configs import Config
from rondo.kernels.triton_support import Compilation, launch, opaque


def linear_scan(
    a: Tensor, b: Tensor, initial_state: Tensor | None, segment_ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See the package for the meaning of the arguments."""
    batch, time = b.shape[:2]
    first = None if initial_state is None else initial_state.reshape(batch, -1)
    h, last = _Scan.apply(
        a.reshape(batch, time, -1), b.reshape(batch, time, -1), first, segment_ids
    )
    return h.view(b.shape), last.view(b[:, 0].shape)


def summarize(a: Tensor, b: Tensor, segment_ids: Tensor | None) -> tuple[Tensor, Tensor]:
    """The product of the factors and the state from zero, `(B, ...)`; no state is written down."""
    batch, time = b.shape[:2]
    results = _Summary.apply(a.reshape(batch, time, -1), b.reshape(batch, time, -1), segment_ids)
    transition, state = (x.view(b[:, 0].shape) for x in results)
    return transition, state


class _Scan(torch.autograd.Function):
    """`(a, b, first or None, ids or None)` -> `(h, last)`; saves a, h and the first state."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        a, b, first, ids = arguments
        h, last = forward_pass(a, b, first, ids)
        ctx.save_for_backward(a, h, first, ids)
        ctx.set_materialize_grads(False)
        return h, last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        a, h, first, ids = ctx.saved_tensors
        grad_a, grad_b, grad_first = backward_pass(a, h, first, ids, *grads)
        return grad_a, grad_b, None if first is None else grad_first, None


class _Summary(torch.autograd.Function):
    """`(a, b, ids or None)` -> `(transition, state)`; the backward pass makes the states again."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        a, b, ids = arguments
        ctx.save_for_backward(a, b, ids)
        ctx.set_materialize_grads(False)
        return _summarize(a, b, ids)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        """The transition is the last state of a scan of nothing from 1."""
        (a, b, ids), (grad_transition, grad_state) = ctx.saved_tensors, grads
        grad_a = grad_b = None
        if grad_state is not None:
            h, _ = forward_pass(a, b, None, ids)
            grad_a, grad_b, _ = backward_pass(a, h, None, ids, None, grad_state)
        if grad_transition is not None:
            ones = torch.ones_like(grad_transition)
            products, _ = forward_pass(a, None, ones, ids)
            more, _, _ = backward_pass(a, products, ones, ids, None, grad_transition)
            grad_a = more if grad_a is None else grad_a + more
        return grad_a, grad_b, None


def _fake_forward(
    a: Tensor, b: Tensor | None, first: Tensor | None, ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    last = a.new_empty(a.shape[0], a.shape[2], dtype=torch.float32)
    return a.new_empty(a.shape, dtype=a.dtype if b is None else b.dtype), last


@opaque("triton_linear_scan", _fake_forward)
def forward_pass(
    a: Tensor, b: Tensor | None, first: Tensor | None, ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    """h and the last state; no b stands for zeros."""
    h, last = _fake_forward(a, b, first, ids)
    a, b, first, ids = contiguous(a, b, first, ids)
    cut = cut_rows(a)

    def start(config: Config) -> None:
        incoming = enter(a, b, first, ids, False, cut, config)
        scan_outputs(a, b, ids, incoming, (h, last), cut, config)

    if h.numel():
        launch("linear_scan", "*", a, (a.shape[2], "whole"), start)
    return h, last


def _fake_backward(
    a: Tensor,
    h: Tensor,
    first: Tensor | None,
    ids: Tensor | None,
    grad: Tensor | None,
    grad_last: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_first = a.new_empty(0) if first is None else first.new_empty(first.shape)
    return a.new_empty(a.shape), h.new_empty(h.shape), grad_first


@opaque("triton_linear_scan_backward", _fake_backward)
def backward_pass(
    a: Tensor,
    h: Tensor,
    first: Tensor | None,
    ids: Tensor | None,
    grad: Tensor | None,
    grad_last: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a, b and the first state (empty without one)."""
    results = _fake_backward(a, h, first, ids, grad, grad_last)
    grad_a, grad_b, grad_first = results
    a, h, first, ids, grad, grad_last = contiguous(a, h, first, ids, grad, grad_last)
    written, cut = (grad_a, grad_b, None if first is None else grad_first), cut_rows(a)

    def start(config: Config) -> None:
        incoming = enter(a, grad, grad_last, ids, True, cut, config)
        scan_gradients(a, h, first, ids, grad, incoming, written, cut, config)

    if h.numel():
        launch("linear_scan_backward", "*", a, (a.shape[2], "whole"), start)
    return results


def _fake_summarize(a: Tensor, b: Tensor, ids: Tensor | None) -> tuple[Tensor, Tensor]:
    product = a.new_empty(a.shape[0], a.shape[2], dtype=torch.float32)
    return product, torch.empty_like(product)


@opaque("triton_linear_scan_summary", _fake_summarize)
def _summarize(a: Tensor, b: Tensor, ids: Tensor | None) -> tuple[Tensor, Tensor]:
    results = _fake_summarize(a, b, ids)
    a, b, ids = contiguous(a, b, ids)
    cut = cut_rows(a)

    def start(config: Config) -> None:
        maps = maps_like(a, cut)
        chunk_maps(a, b, ids, False, cut, maps, config)
        borders(maps, None, None, results, False, config)

    if a.numel():
        launch("linear_scan", "*", a, (a.shape[2], "summary"), start)
    return results


def ahead_of_time() -> list[Compilation]:
    """Forward and backward with documents, bfloat16 and float32."""
    listed = []
    for dtype in ("*bf16", "*fp32"):
        types = dict.fromkeys(("a", "b", "h", "grad", "grad_a", "grad_b"), dtype)
        states = ("products", "states", "first", "incoming", "last", "grad_first")
        types |= dict.fromkeys(states, "*fp32") | {"ids": "*i64"}
        types |= dict.fromkeys(("time", "length", "chunks", "blocks", "width"), "i32")
        for name, kernel, constants in (
            ("linear_scan", scan_chunks, {"REVERSE": False}),
            ("linear_scan", scan_forward, {}),
            ("linear_scan_backward", scan_chunks, {"REVERSE": True}),
            ("linear_scan_backward", scan_backward, {}),
        ):
            listed.append(Compilation(name, kernel, types, constants, multiples=("width",)))
    types = dict.fromkeys(("products", "states", "first", "incoming"), "*fp32")
    types |= dict.fromkeys(("chunks", "blocks", "width"), "i32")
    outputs = {"product_out": None, "state_out": None, "REVERSE": True}
    borders = Compilation("linear_scan_borders", scan_borders, types, outputs, multiples=("width",))
    return [*listed, borders]
