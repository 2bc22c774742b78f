"""The two cells of ParaRNN (arXiv 2510.21450): a step, its Jacobian, and gradients through it.

Every channel sees its own state only. Gates are what the inputs contribute, `B x + b`; weights are
what a channel's own state is multiplied by. Tensors are `(..., W)` for W channels, weights `(W,)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

State = list[Tensor]
"""The variables of a channel, one tensor each."""
Block = list[list[Tensor]]
"""A matrix a channel: `[row][column]`."""

_sigmoid_backward = torch.ops.aten.sigmoid_backward
_tanh_backward = torch.ops.aten.tanh_backward


class Linear(NamedTuple):
    """A step and all about it to first order."""

    state: State
    jacobian: Block
    """The derivative of the next state by the state."""
    tape: Any
    """What `Cell.pull` needs to know of the step."""


class Cell(Protocol):
    """What the solver asks of a cell."""

    variables: int
    """State variables a channel; the last one is the output."""

    def step(self, state: State, gates: Sequence[Tensor], weights: Sequence[Tensor]) -> State:
        """The next state."""
        ...

    def linearize(self, state: State, gates: Sequence[Tensor], weights: Sequence[Tensor]) -> Linear:
        """The next state and its derivatives."""
        ...

    def pull(self, tape: Any, grads: State, totals: Sequence[Tensor]) -> Sequence[Tensor]:
        """Gradients of the gates, from those of the next state. Those of the weights are added to
        `totals`, `(..., W)` each, not yet summed over positions."""
        ...


class ParaGRU:
    """z = σ(g_z + a_z h), r = σ(g_r + a_r h), n = tanh(g_n + a_n h r), h' = (1 - z) h + z n."""

    variables = 1
    gates: ClassVar = ("z", "r", "n")
    weights: ClassVar = ("a_z", "a_r", "a_n")

    def step(self, state: State, gates: Sequence[Tensor], weights: Sequence[Tensor]) -> State:
        z, _, _, n = self._gates(state[0], gates, weights)
        return [torch.lerp(state[0], n, z)]

    def linearize(self, state: State, gates: Sequence[Tensor], weights: Sequence[Tensor]) -> Linear:
        (h,), (a_z, a_r, a_n) = state, weights
        z, r, reset, n = self._gates(h, gates, weights)
        # Derivatives of h' by the three pre-activations.
        by_z, by_n = _sigmoid_backward(n - h, z), _tanh_backward(z, n)
        by_reset = by_n * a_n
        by_r = _sigmoid_backward(by_reset * h, r)
        slope = by_reset.mul_(r).addcmul_(by_z, a_z).addcmul_(by_r, a_r).add_(1.0).sub_(z)
        return Linear([torch.lerp(h, n, z)], [[slope]], (h, reset, by_z, by_r, by_n))

    def pull(self, tape: Any, grads: State, totals: Sequence[Tensor]) -> Sequence[Tensor]:
        h, reset, *slopes = tape
        found = [slope.mul_(grads[0]) for slope in slopes]
        for total, at, x in zip(totals, found, (h, h, reset), strict=True):
            total.addcmul_(at, x)
        return found

    @staticmethod
    def _gates(
        h: Tensor, gates: Sequence[Tensor], weights: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """z, r, h r and n."""
        z = torch.addcmul(gates[0], h, weights[0]).sigmoid_()
        r = torch.addcmul(gates[1], h, weights[1]).sigmoid_()
        reset = h * r
        return z, r, reset, torch.addcmul(gates[2], reset, weights[2]).tanh_()


class ParaLSTM:
    """Input and forget gate are coupled, f and o look at c. The state is (c, h).

    f = σ(g_f + a_f h + c_f c)    z = tanh(g_z + a_z h)    c' = f c + (1 - f) z
    o = σ(g_o + a_o h + c_o c')   h' = o tanh(c')
    """

    variables = 2
    gates: ClassVar = ("f", "o", "z")
    weights: ClassVar = ("a_f", "a_o", "a_z", "c_f", "c_o")

    def step(self, state: State, gates: Sequence[Tensor], weights: Sequence[Tensor]) -> State:
        _, _, c, o, t = self._gates(state, gates, weights)
        return [c, o * t]

    def linearize(self, state: State, gates: Sequence[Tensor], weights: Sequence[Tensor]) -> Linear:
        (c, h), (a_f, a_o, a_z, c_f, c_o) = state, weights
        f, z, after, o, t = self._gates(state, gates, weights)
        # Derivatives of c' by the pre-activations of f and z, of h' by that of o and by c'.
        by_f, by_z = _sigmoid_backward(c - z, f), _tanh_backward(1.0 - f, z)
        by_o = _sigmoid_backward(t, o)
        by_c = _tanh_backward(o, t).addcmul_(by_o, c_o)
        c_c = torch.addcmul(f, by_f, c_f)
        c_h = (by_f * a_f).addcmul_(by_z, a_z)
        jacobian = [[c_c, c_h], [by_c * c_c, (by_o * a_o).addcmul_(by_c, c_h)]]
        return Linear([after, o * t], jacobian, (c, h, after, by_c, by_f, by_o, by_z))

    def pull(self, tape: Any, grads: State, totals: Sequence[Tensor]) -> Sequence[Tensor]:
        (c, h, after, by_c, by_f, by_o, by_z), (at_c, at_h) = tape, grads
        at_c = by_c.mul_(at_h).add_(at_c)
        at_f, at_o, at_z = by_f.mul_(at_c), by_o.mul_(at_h), by_z.mul_(at_c)
        sources = ((at_f, h), (at_o, h), (at_z, h), (at_f, c), (at_o, after))
        for total, (at, x) in zip(totals, sources, strict=True):
            total.addcmul_(at, x)
        return at_f, at_o, at_z

    @staticmethod
    def _gates(
        state: State, gates: Sequence[Tensor], weights: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """f, z, c', o and tanh(c')."""
        (c, h), (a_f, a_o, a_z, c_f, c_o) = state, weights
        f = torch.addcmul(gates[0], h, a_f).addcmul_(c, c_f).sigmoid_()
        z = torch.addcmul(gates[2], h, a_z).tanh_()
        after = torch.lerp(z, c, f)
        o = torch.addcmul(gates[1], h, a_o).addcmul_(after, c_o).sigmoid_()
        return f, z, after, o, after.tanh()
