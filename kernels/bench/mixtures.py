"""Cases of mixtures of experts: the way of tokens to experts and back, and the products of experts.
Inputs and results as in `cases.py`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rondo.kernels import combine_rows, gather_rows
from rondo.kernels.bench.presets import Preset, draw, matrices
from rondo.kernels.expert_products import outer_sums, rows_times

EXPERTS, TOP_K, EXPERT_DIM = 64, 4, 672
"""As in `models/presets/rmoe-hybrid-7b.yaml`."""


def _routed(tokens: int, device: torch.device) -> dict[str, Tensor]:
    """Every token's choice of experts: order, places, and the expert of each row and the row after
    each expert's last."""
    scores = torch.rand(tokens, EXPERTS, device=device)
    experts, order = scores.topk(TOP_K).indices.flatten().sort(stable=True)
    counts = torch.zeros(EXPERTS, dtype=torch.long, device=device)
    ends = counts.index_add_(0, experts, torch.ones_like(experts)).cumsum(0)
    places = order.argsort().view(tokens, TOP_K)
    return {"order": order, "places": places, "experts": experts, "ends": ends}


def gather_case(p: Preset, batch: int, time: int, device: torch.device) -> Any:
    """Tokens in the order of their experts."""
    way = _routed(batch * time, device)
    order, places = way["order"], way["places"]
    inputs = {"x": draw(batch * time, p.dim, device=device)}
    return (lambda x: gather_rows(x, order, places)), inputs, 0.0, 0.0, way


def combine_case(p: Preset, batch: int, time: int, device: torch.device) -> Any:
    """Weighted sums over the rows of a token."""
    way = _routed(batch * time, device)
    order, places = way["order"], way["places"]
    inputs = {
        "y": draw(len(order), p.dim, device=device),
        "weights": torch.rand(places.shape, device=device).requires_grad_(),
    }
    return (lambda y, weights: combine_rows(y, order, places, weights)), inputs, 0.0, 0.0, way


def product_case(p: Preset, batch: int, time: int, device: torch.device) -> Any:
    """The first product of experts, gate and up at once, of rows under random loads. Forward,
    `2 m dim (2 inner)` FLOPs for m rows, and twice that backward."""
    inner = min(EXPERT_DIM, p.dim)
    way = {"ends": _routed(batch * time, device)["ends"].int()}
    rows = batch * time * TOP_K
    weight = matrices(EXPERTS, 2 * inner, p.dim, device).detach().bfloat16()
    inputs = {"x": draw(rows, p.dim, device=device), "weight": weight.requires_grad_()}
    flops = 4.0 * rows * p.dim * inner
    return (
        (lambda x, weight: _Products.apply(x, weight, way["ends"])),
        inputs,
        flops,
        2 * flops,
        way,
    )


class _Products(torch.autograd.Function):
    """What `models/ffn/experts.py` does for each of its products, forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, ends)
        return rows_times(x, weight.mT, ends)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, ends = ctx.saved_tensors
        return rows_times(grad, weight, ends), outer_sums(grad, x, ends), None
