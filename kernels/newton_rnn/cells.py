"""The two cells of ParaRNN (arXiv 2510.21450): a step, its Jacobian, and gradients through it.

Every channel sees its own state only. Gates are what the inputs contribute, `B x + b`; weights are
what a channel's own state is multiplied by. States are `(N, B, P, W)` for N variables, P positions
and W channels; gates `(B, P, W)` each, weights `(W,)` each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from rondo.kernels.hyperbolic import tanh, tanh_

_sigmoid_backward = torch.ops.aten.sigmoid_backward.grad_input
_tanh_backward = torch.ops.aten.tanh_backward.grad_input


class Linear(NamedTuple):
    """A step and all about it to first order."""

    state: Tensor
    jacobian: Tensor
    """`(N, N, B, P, W)`: the derivative of the next state by the state."""
    tape: Any
    """What `Cell.pull` needs to know of the step; it may use it up."""


class Cell(Protocol):
    """What the solver asks of a cell."""

    variables: int
    """State variables a channel; the last one is the output."""

    def step(self, state: Tensor, gates: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
        """The next state."""
        ...

    def linearize(
        self, state: Tensor, gates: Sequence[Tensor], weights: Sequence[Tensor]
    ) -> Linear:
        """The next state and its derivatives."""
        ...

    def pull(
        self, tape: Any, grads: Tensor, totals: Sequence[Tensor], out: Sequence[Tensor]
    ) -> None:
        """Writes the gradients of the gates to `out`, from those of the next state. Those of the
        weights are added to `totals`, `(B, P, W)` each, not yet summed over positions."""
        ...


class ParaGRU:
    """z = σ(g_z + a_z h), r = σ(g_r + a_r h), n = tanh(g_n + a_n h r), h' = (1 - z) h + z n."""

    variables = 1
    gates: ClassVar = ("z", "r", "n")
    weights: ClassVar = ("a_z", "a_r", "a_n")

    def step(self, state: Tensor, gates: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
        (h,), (a_z, a_r, a_n) = state, weights
        z = torch.addcmul(gates[0], h, a_z).sigmoid_()
        reset = torch.addcmul(gates[1], h, a_r).sigmoid_().mul_(h)
        n = tanh_(torch.addcmul(gates[2], reset, a_n, out=reset))
        return torch.lerp(h, n, z, out=n).unsqueeze(0)

    def linearize(
        self, state: Tensor, gates: Sequence[Tensor], weights: Sequence[Tensor]
    ) -> Linear:
        (h,), (a_z, a_r, a_n) = state, weights
        z = torch.addcmul(gates[0], h, a_z).sigmoid_()
        r = torch.addcmul(gates[1], h, a_r).sigmoid_()
        reset = h * r
        n = tanh_(torch.addcmul(gates[2], reset, a_n))
        # Derivatives of h' by the three pre-activations; a tensor is used again once it is read.
        by_z = n - h
        by_n = _tanh_backward(z, n, grad_input=torch.empty_like(n))
        after = torch.lerp(h, n, z, out=n)
        _sigmoid_backward(by_z, z, grad_input=by_z)
        slope = by_n * a_n
        by_r = slope * h
        _sigmoid_backward(by_r, r, grad_input=by_r)
        slope.mul_(r).addcmul_(by_z, a_z).addcmul_(by_r, a_r).add_(1.0).sub_(z)
        return Linear(after.unsqueeze(0), slope[None, None], (h, reset, by_z, by_r, by_n))

    def pull(
        self, tape: Any, grads: Tensor, totals: Sequence[Tensor], out: Sequence[Tensor]
    ) -> None:
        h, reset, *slopes = tape
        for total, slope, at, x in zip(totals, slopes, out, (h, h, reset), strict=True):
            torch.mul(slope, grads[0], out=at)
            total.addcmul_(at, x)


class ParaLSTM:
    """Input and forget gate are coupled, f and o look at c. The state is (c, h).

    f = σ(g_f + a_f h + c_f c)    z = tanh(g_z + a_z h)    c' = f c + (1 - f) z
    o = σ(g_o + a_o h + c_o c')   h' = o tanh(c')
    """

    variables = 2
    gates: ClassVar = ("f", "o", "z")
    weights: ClassVar = ("a_f", "a_o", "a_z", "c_f", "c_o")

    def step(self, state: Tensor, gates: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
        (c, h), (a_f, a_o, a_z, c_f, c_o) = state, weights
        next_state = c.new_empty(state.shape)
        f = torch.addcmul(gates[0], h, a_f).addcmul_(c, c_f).sigmoid_()
        z = tanh_(torch.addcmul(gates[2], h, a_z))
        after = torch.lerp(z, c, f, out=next_state[0])
        o = torch.addcmul(gates[1], h, a_o, out=z).addcmul_(after, c_o).sigmoid_()
        torch.mul(o, tanh(after, out=f), out=next_state[1])
        return next_state

    def linearize(
        self, state: Tensor, gates: Sequence[Tensor], weights: Sequence[Tensor]
    ) -> Linear:
        (c, h), (a_f, a_o, a_z, c_f, c_o) = state, weights
        next_state = c.new_empty(state.shape)
        jacobian = c.new_empty(2, *state.shape)
        (c_c, c_h), (h_c, h_h) = jacobian
        f = torch.addcmul(gates[0], h, a_f).addcmul_(c, c_f).sigmoid_()
        z = tanh_(torch.addcmul(gates[2], h, a_z))
        after = torch.lerp(z, c, f, out=next_state[0])
        o = torch.addcmul(gates[1], h, a_o).addcmul_(after, c_o).sigmoid_()
        by_o = tanh(after)
        torch.mul(o, by_o, out=next_state[1])
        # Derivatives of c' by the pre-activations of f and z, of h' by that of o and by c'; a
        # tensor is used again once it is read.
        by_c = _tanh_backward(o, by_o, grad_input=torch.empty_like(o))
        _sigmoid_backward(by_o, o, grad_input=by_o)
        by_c.addcmul_(by_o, c_o)
        by_f = torch.sub(c, z, out=o)
        _sigmoid_backward(by_f, f, grad_input=by_f)
        torch.addcmul(f, by_f, c_f, out=c_c)
        by_z = _tanh_backward(f.neg_().add_(1.0), z, grad_input=f)
        torch.mul(by_f, a_f, out=c_h).addcmul_(by_z, a_z)
        torch.mul(by_c, c_c, out=h_c)
        torch.mul(by_o, a_o, out=h_h).addcmul_(by_c, c_h)
        return Linear(next_state, jacobian, (c, h, after, by_c, by_f, by_o, by_z))

    def pull(
        self, tape: Any, grads: Tensor, totals: Sequence[Tensor], out: Sequence[Tensor]
    ) -> None:
        c, h, after, by_c, by_f, by_o, by_z = tape
        at_c = by_c.mul_(grads[1]).add_(grads[0])
        at_f, at_o, at_z = out
        torch.mul(by_f, at_c, out=at_f)
        torch.mul(by_o, grads[1], out=at_o)
        torch.mul(by_z, at_c, out=at_z)
        sources = ((at_f, h), (at_o, h), (at_z, h), (at_f, c), (at_o, after))
        for total, (at, x) in zip(totals, sources, strict=True):
            total.addcmul_(at, x)
