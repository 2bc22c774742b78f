"""Recurrent cells over depth, with one set of weights for all layers."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rondo.models.init import constant, normal, parameter, uniform

GATES = {"gru": 3, "lstm": 4, "rnn": 1}
"""Cells by name, and how many gates' worth of rows their matrices have; as in `torch.nn.GRUCell`,
`LSTMCell` and `RNNCell` (tanh)."""
STATES = {"gru": 1, "lstm": 2, "rnn": 1}
"""Vectors that a cell hands on."""


class CellWeights(NamedTuple):
    """What `step` reads; the first four as torch's functional cells order them."""

    input: Tensor
    state: Tensor
    input_bias: Tensor
    state_bias: Tensor
    projection: Tensor | None


class SharedCell(nn.Module):
    """The weights of a cell of `width` inputs and outputs, and where it is shared too, those of
    the projection `(width, dim)` before it. Layers get them through `forward()`."""

    def __init__(self, kind: str, width: int, *, dim: int, std: float, projects: bool) -> None:
        super().__init__()
        rows, bound = GATES[kind] * width, width**-0.5  # torch's default
        self.input_weight = parameter((rows, width), uniform(-bound, bound))
        self.state_weight = parameter((rows, width), uniform(-bound, bound))
        self.input_bias = parameter((rows,), constant(0.0))
        self.state_bias = parameter((rows,), constant(0.0))
        self.projection = parameter((width, dim), normal(std)) if projects else None

    @property
    def float32_parameters(self) -> tuple[str, ...]:
        """All of them."""
        return tuple(name for name, _ in self.named_parameters())

    def forward(self) -> CellWeights:
        return CellWeights(
            self.input_weight,
            self.state_weight,
            self.input_bias,
            self.state_bias,
            self.projection,
        )


def step(kind: str, x: Tensor, state: Tensor, weights: CellWeights) -> Tensor:
    """The state `(n, STATES · width)` after the input `x` `(n, width)`; its first `width` numbers
    are the cell's output.

    Torch's own cells write into the results of products, which selective activation checkpointing
    has kept by then and hands out again.
    """
    if kind == "gru":
        return _GRU.apply(x, state, *weights[:4])
    width = x.shape[-1]
    h = state[:, :width]
    total = F.linear(x, weights.input, weights.input_bias + weights.state_bias)
    total = total + F.linear(h, weights.state)
    if kind == "rnn":
        return total.tanh()
    i, f, g, o = total.chunk(4, -1)
    c = f.sigmoid() * state[:, width:] + i.sigmoid() * g.tanh()
    return torch.cat((o.sigmoid() * c.tanh(), c), -1)


class _GRU(torch.autograd.Function):
    """`r, z = σ(W x + b + U h + b')`, `c = tanh(W_c x + b_c + r (U_c h + b'_c))`,
    `h' = (1 − z) c + z h`: keeps six vectors a token, half of what its parts would."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, h: Tensor, w: Tensor, u: Tensor, bw: Tensor, bu: Tensor
    ) -> Tensor:
        p = h.shape[-1]
        rz = F.linear(x, w[: 2 * p], bw[: 2 * p] + bu[: 2 * p])
        rz = torch.addmm(rz, h, u[: 2 * p].T).sigmoid()
        r, z = rz.chunk(2, -1)
        from_state = F.linear(h, u[2 * p :], bu[2 * p :])
        c = F.linear(x, w[2 * p :], bw[2 * p :]).addcmul(r, from_state).tanh()
        ctx.save_for_backward(x, h, w, u, rz, from_state, c)
        return torch.lerp(c, h, z)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        x, h, w, u, rz, from_state, c = ctx.saved_tensors
        p = h.shape[-1]
        r, z = rz.chunk(2, -1)
        at_input, at_state = grad.new_empty(2, len(grad), 3 * p)
        kept = grad * z
        at_c = torch.ops.aten.tanh_backward(grad - kept, c)
        torch.mul(at_c, from_state, out=at_state[:, :p])
        torch.mul(grad, h - c, out=at_state[:, p : 2 * p])
        gates = torch.ops.aten.sigmoid_backward(at_state[:, : 2 * p], rz)
        at_input[:, : 2 * p] = gates
        at_state[:, : 2 * p] = gates
        at_input[:, 2 * p :] = at_c
        torch.mul(at_c, r, out=at_state[:, 2 * p :])
        return (
            at_input @ w,
            kept.addmm(at_state, u),
            at_input.T @ x,
            at_state.T @ h,
            at_input.sum(0),
            at_state.sum(0),
        )
