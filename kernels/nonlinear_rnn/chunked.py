"""A loop over time with one batched product and a few operations in place a step, and a backward
pass by hand: what does not depend on later positions is made for many positions at once, and the
gradient of the recurrent weights is one product after the loop.

Letters in shapes: T time, H heads, B batch, P parts of a position (see `cells.py`), S states.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rondo.kernels.linear import batched_product
from rondo.kernels.nonlinear_rnn.cells import Cell
from rondo.kernels.nonlinear_rnn.products import Products
from rondo.kernels.segments import document_starts
from rondo.kernels.tiles import values_are_known

BLOCK = 64
"""Positions whose slopes are made at once in the backward pass."""


@torch.compiler.disable  # it would unroll the positions: one graph break
def nonlinear_rnn(
    cell: Cell,
    gates: Tensor,
    recurrent: Tensor,
    bias: Tensor | None,
    first: Tensor,
    segment_ids: Tensor | None,
    cut: bool,
) -> tuple[Tensor, Tensor]:
    """Runs a cell over every row.

    Args:
        cell: whose states and gates the others have.
        gates: `(B, T, G, H, D)` of any floating dtype.
        recurrent: `(G, H, D, D)`; it, `bias` and `first` have the dtype to compute in.
        bias: `(.., H, D)` or None.
        first: `(B, S, H, D)`, the state before position 0.
        segment_ids: `(B, T)` or None.
        cut: h is a constant where it is multiplied by `recurrent`.

    Returns:
        h `(B, T, H, D)` in the dtype of gates and the state `(B, S, H, D)` after the last position.
    """
    return _Loop.apply(cell, cut, gates, recurrent, bias, first, segment_ids)


class _Loop(torch.autograd.Function):
    """`nonlinear_rnn`. Keeps the parts and the states of all positions."""

    @staticmethod
    def forward(ctx: Any, cell: Cell, cut: bool, *arguments: Any) -> tuple[Tensor, Tensor]:
        gates, recurrent, bias, first, segment_ids = arguments
        parts = _parts(cell, gates, bias, recurrent.dtype)
        time, heads, batch, _, dim = parts.shape
        path = parts.new_empty(len(cell.states), time + 1, heads, batch, dim)
        path[:, 0] = first.permute(1, 2, 0, 3)
        cell.begin(path[:, 0])
        weights = _weights(cell, recurrent)
        starts = None if segment_ids is None else document_starts(segment_ids)
        _run(cell, parts, path, weights, _cuts(starts))
        ctx.cell, ctx.cut, ctx.dtype, ctx.has_bias = cell, cut, gates.dtype, bias is not None
        ctx.save_for_backward(parts, path, weights, starts)
        h = path[0, 1:].permute(2, 0, 1, 3).to(gates.dtype, memory_format=torch.contiguous_format)
        return h, path[:, -1].permute(2, 0, 1, 3).contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh: Tensor, dlast: Tensor) -> tuple[Any, ...]:
        parts, path, weights, starts = ctx.saved_tensors
        cell, before = ctx.cell, path[:, :-1]
        if starts is not None:
            fresh = path.new_tensor(cell.fresh).view(-1, 1, 1, 1, 1)
            before = torch.where(starts.t()[:, None, :, None], fresh, before)
        douts = dh.to(path.dtype).permute(1, 2, 0, 3).contiguous()
        dparts = torch.empty_like(parts)
        carry = dlast.permute(1, 2, 0, 3).contiguous()
        back = None if ctx.cut else weights
        _run_back(cell, (parts, before, path[:, 1:]), back, _cuts(starts), douts, carry, dparts)
        dbias = None
        if ctx.has_bias:
            dbias = placed(dparts.sum(0).sum(1).transpose(0, 1), cell.offsets)
        return (
            None,
            None,
            gate_gradients(cell, dparts, ctx.dtype),
            weight_gradients(cell, dparts, before[0]),
            dbias,
            carry.permute(2, 0, 1, 3),
            None,
        )


def _parts(cell: Cell, gates: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`(T, H, B, P, D)`: what inputs and biases contribute."""
    batch, time, _, heads, dim = gates.shape
    parts = gates.new_empty(time, heads, batch, len(cell.inputs), dim, dtype=dtype)
    for part, gate in zip(parts.unbind(3), cell.inputs, strict=True):
        if gate is None:
            part.zero_()
        else:
            part.copy_(gates[:, :, gate].permute(1, 2, 0, 3))
    if bias is not None:
        parts += bias[list(cell.offsets)].transpose(0, 1).unsqueeze(1)
    return parts


def _weights(cell: Cell, recurrent: Tensor) -> Tensor:
    """`(H, parts·D out, D in)`."""
    # The forward pass reads it transposed: few rows by 256 x 1,024 weights take half as long so.
    return recurrent[list(cell.products)].transpose(0, 1).flatten(1, 2).contiguous()


def _cuts(starts: Tensor | None) -> dict[int, Tensor]:
    """Position -> `(B, 1)` bool, which rows begin a document there; positions where none does are
    left out if that is known."""
    if starts is None:
        return {}
    columns = starts.t().unsqueeze(2).unbind(0)
    if not values_are_known(starts):
        return dict(enumerate(columns))
    return {t: columns[t] for t in starts.any(0).nonzero().flatten().tolist()}


def _run(cell: Cell, parts: Tensor, path: Tensor, weights: Tensor, cuts: dict[int, Tensor]) -> None:
    """Fills `path` `(S, T + 1, H, B, D)`, whose first states are there; `weights` are those of
    `_weights`."""
    states = list(zip(*(x.unbind(0) for x in path), strict=True))
    products = parts.flatten(3)[..., : weights.shape[1]].unbind(0)
    by_weights = Products(weights, parts.shape[2])
    for t, (product, x) in enumerate(zip(products, cell.views(parts), strict=True)):
        before = states[t]
        if t in cuts:
            each = zip(cell.fresh, before, strict=True)
            before = tuple(torch.where(cuts[t], fresh, s) for fresh, s in each)
        by_weights.add(product, before[0])
        cell.step(x, before, states[t + 1])


def _run_back(
    cell: Cell,
    kept: tuple[Tensor, Tensor, Tensor],
    back: Tensor | None,
    cuts: dict[int, Tensor],
    douts: Tensor,
    carry: Tensor,
    dparts: Tensor,
) -> None:
    """Fills `dparts` and turns `carry`, the gradient of the last states, into that of the first.
    `kept`: parts, and states before and after each position; `back` `(H, parts·D out, D in)` takes
    gradients of the products to h, None: nowhere."""
    parts, before, after = kept
    width = 0 if back is None else back.shape[1]
    by_weights = None if back is None else Products(back.mT, parts.shape[2])
    products = dparts.flatten(3)[..., :width].unbind(0)
    outs, grads, states = cell.outs(dparts), douts.unbind(0), carry.unsqueeze(3).unbind(0)
    to_h = carry[0].clone()
    carry[[0, *cell.constants]] = 0.0
    for start in reversed(range(0, len(parts), BLOCK)):
        block = slice(start, min(start + BLOCK, len(parts)))
        slopes = cell.slopes(parts[block], before[:, block], after[:, block])
        for t in reversed(range(block.start, block.stop)):
            if t == len(parts) - 1:
                dh = to_h.add_(grads[t])
            else:
                keep = ~cuts[t + 1] if t + 1 in cuts else None
                if keep is not None:
                    carry *= keep
                dh = _before(grads[t], products[t + 1], by_weights, keep)
            cell.pull(dh.unsqueeze(2), states, slopes[t - start], outs[t])
    if by_weights is not None:
        by_weights.add(carry[0], products[0])


def _before(
    grad: Tensor, product: Tensor, by_weights: Products | None, keep: Tensor | None
) -> Tensor:
    """The gradient `(H, B, D)` of an h: of the output, and of the product after it in the rows that
    `keep` names."""
    if by_weights is None:
        return grad.clone()
    found = by_weights(product)
    return (found if keep is None else found.mul_(keep)).add_(grad)


def placed(x: Tensor, places: tuple[int, ...]) -> Tensor:
    """Row p of `x` at row `places[p]`."""
    return torch.empty_like(x[: len(places)]).index_copy_(
        0, torch.tensor(places, device=x.device), x[: len(places)]
    )


def gate_gradients(cell: Cell, dparts: Tensor, dtype: torch.dtype) -> Tensor:
    """`(B, T, G, H, D)` in `dtype`, from the gradients of the parts `(T, H, B, P, D)`."""
    time, heads, batch, _, dim = dparts.shape
    out = dparts.new_empty(batch, time, len(cell.gates), heads, dim, dtype=dtype)
    for part, gate in zip(dparts.unbind(3), cell.inputs, strict=True):
        if gate is not None:
            out[:, :, gate].copy_(part.permute(2, 0, 1, 3))
    return out


def weight_gradients(cell: Cell, dparts: Tensor, h: Tensor) -> Tensor:
    """`(G, H, D, D)`, from the gradients of the products and the h they were made from."""
    count, dim = len(cell.products), h.shape[-1]
    products = dparts.flatten(3)[..., : count * dim].transpose(0, 1).flatten(1, 2)
    inputs = h.transpose(0, 1).flatten(1, 2)
    # The wider side last: oneDNN is faster so.
    found = batched_product(inputs.mT, products.mT).mT.contiguous()
    return placed(found.unflatten(1, (count, dim)).transpose(0, 1), cell.products)
