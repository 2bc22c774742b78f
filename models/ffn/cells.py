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


def step(
    kind: str,
    x: Tensor,
    state: Tensor,
    weights: CellWeights,
    *,
    gradients: torch.dtype | None = None,
) -> Tensor:
    """The state `(n, STATES · width)` after the input `x` `(n, width)`; its first `width` numbers
    are the cell's output. `gradients`: the dtype that the GRU's products are computed in on the
    way back; None: that of `x`.

    Torch's own cells write into the results of products, which selective activation checkpointing
    has kept by then and hands out again.
    """
    if kind == "gru":
        return _GRU.apply(x, state, *weights[:4], gradients or x.dtype)
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
        ctx: Any,
        x: Tensor,
        h: Tensor,
        w: Tensor,
        u: Tensor,
        bw: Tensor,
        bu: Tensor,
        low: torch.dtype,
    ) -> Tensor:
        p = h.shape[-1]
        gates = torch.cat((w[: 2 * p], u[: 2 * p]), -1)
        rz = F.linear(torch.cat((x, h), -1), gates, bw[: 2 * p] + bu[: 2 * p]).sigmoid()
        r, z = rz.chunk(2, -1)
        from_state = F.linear(h, u[2 * p :], bu[2 * p :])
        c = F.linear(x, w[2 * p :], bw[2 * p :]).addcmul(r, from_state).tanh()
        ctx.save_for_backward(x, h, w, u, rz, from_state, c)
        ctx.low = low
        return torch.lerp(c, h, z)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, h, w, u, *kept = ctx.saved_tensors
        p, low = h.shape[-1], ctx.low
        gates, past = _at_gates(grad, h, *kept)
        bias, at = gates.sum(0), gates.to(low)
        at_input, at_state = at[:, : 3 * p], at[:, p:]
        at_w = at_input.T @ x.to(low)
        at_w, input_bias = (torch.cat((each[p : 3 * p], each[:p])) for each in (at_w, bias))
        return (
            (at_input @ torch.cat((w[2 * p :], w[: 2 * p])).to(low)).to(x.dtype),
            past.add_(at_state @ u.to(low)),
            at_w.to(w.dtype),
            (at_state.T @ h.to(low)).to(u.dtype),
            input_bias,
            bias[p:],
            None,
        )


def _at_gates(
    grad: Tensor, h: Tensor, rz: Tensor, from_state: Tensor, c: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients before the activations of c, r and z and at `U_c h + b'_c`, `(n, 4 p)`: what the
    input's products get is the first three, what the state's get is the last three. And what of the
    gradient passes the cell by, `(n, p)`."""
    p = h.shape[-1]
    r, z = rz.chunk(2, -1)
    at = grad.new_empty(len(grad), 4 * p)
    at_c, at_r, at_z, at_product = at.chunk(4, -1)
    past = grad * z
    torch.ops.aten.tanh_backward.grad_input(grad - past, c, grad_input=at_c)
    torch.mul(at_c, from_state, out=at_r)
    torch.mul(grad, h - c, out=at_z)
    at_rz = at[:, p : 3 * p]
    torch.ops.aten.sigmoid_backward.grad_input(at_rz, rz, grad_input=at_rz)
    torch.mul(at_c, r, out=at_product)
    return at, past
