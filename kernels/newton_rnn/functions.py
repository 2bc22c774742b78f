"""A cell that is a plain function: its derivatives come from automatic differentiation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rondo.kernels.newton_rnn.cells import Linear


class FunctionCell:
    """`function(state, gates, weights) -> state`, elementwise over channels.

    With one state variable `state` is a tensor, with more a tuple of so many; `gates` and `weights`
    are sequences of tensors, one for each row of what `newton_rnn` is given. Shapes broadcast to
    the state's `(..., W)`. The last variable is the output.
    """

    def __init__(self, function: Callable[..., Any], variables: int = 1) -> None:
        if variables < 1:
            raise ValueError(f"variables is {variables}, expected at least 1")
        self.function, self.variables = function, variables

    def step(self, state: Tensor, gates: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
        return torch.stack(self._call(gates, weights)(*state.unbind(0)))

    def linearize(
        self, state: Tensor, gates: Sequence[Tensor], weights: Sequence[Tensor]
    ) -> Linear:
        """Forward mode: one tangent for each variable gives that column of every channel."""
        columns, after = [], ()
        for i in range(self.variables):
            tangents = torch.zeros_like(state)
            tangents[i] = 1.0
            after, column, *_ = torch.func.jvp(
                self._call(gates, weights), state.unbind(0), tangents.unbind(0)
            )
            columns.append(torch.stack(column))
        return Linear(torch.stack(after), torch.stack(columns, 1), (state, gates, weights))

    def pull(
        self, tape: Any, grads: Tensor, totals: Sequence[Tensor], out: Sequence[Tensor]
    ) -> None:
        state, gates, weights = tape
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in gates]
            leaves += [w.detach().expand_as(state[0]).requires_grad_() for w in weights]
            after = self.step(state, leaves[: len(gates)], leaves[len(gates) :])
        found = torch.autograd.grad(after, leaves, grads, materialize_grads=True)
        for at, grad in zip(out, found[: len(gates)], strict=True):
            at.copy_(grad)
        for total, grad in zip(totals, found[len(gates) :], strict=True):
            total += grad

    def check(self, gates: Tensor, weights: Tensor) -> None:
        """Calls the function for the first position of `(B, T, G, W)`.

        Raises ValueError if it does not return a state like the one it was given, if what it
        returns for a channel depends on another one's state or on gates of another position, or if
        it depends on a tensor that requires grad and is no argument: the solver would not see it.
        """
        inputs = gates[:1, :1].to(weights.dtype).expand(2, 2, -1, -1).unbind(2)
        zero = inputs[0].new_zeros(self.variables, *inputs[0].shape)
        poisoned = zero.clone()
        poisoned[:, 0, 0, 0] = torch.nan
        elsewhere = [x.clone() for x in inputs]
        for x in elsewhere:
            x[0, 0] = torch.nan
        probes = (inputs, zero), (inputs, poisoned), (elsewhere, zero)
        with torch.no_grad():
            plain, other, moved = (
                self._call(given, weights.unbind(0))(*x.unbind(0)) for given, x in probes
            )
        with torch.enable_grad():
            given = [x.detach() for x in inputs], [w.detach() for w in weights.unbind(0)]
            if any(x.requires_grad for x in self._call(*given)(*zero.unbind(0))):
                raise ValueError(
                    "the cell reads a tensor that requires grad and is no argument of it, whose "
                    "gradient would be lost: give it as one of the weights"
                )
        for x, y, z, like in zip(plain, other, moved, zero, strict=True):
            if x.shape != like.shape or x.dtype != like.dtype:
                raise ValueError(
                    f"the cell returns {tuple(x.shape)} {x.dtype} for a state "
                    f"{tuple(like.shape)} {like.dtype}: expected the same"
                )
            differs = x.isnan() != y.isnan()
            differs[0, 0, 0] = False
            if differs.any():
                raise ValueError(
                    "the cell is not elementwise: a channel's next state depends on the state of "
                    "another channel or position"
                )
            differs = x.isnan() != z.isnan()
            differs[0, 0] = False
            if differs.any():
                raise ValueError(
                    "the cell is not elementwise: a position's next state depends on gates of "
                    "another position"
                )

    def _call(
        self, gates: Sequence[Tensor], weights: Sequence[Tensor]
    ) -> Callable[..., tuple[Tensor, ...]]:
        def call(*state: Tensor) -> tuple[Tensor, ...]:
            after = self.function(state if len(state) > 1 else state[0], gates, weights)
            after = (after,) if isinstance(after, Tensor) else tuple(after)
            if len(after) != self.variables:
                raise ValueError(
                    f"the cell returns {len(after)} tensors, expected {self.variables}: one for "
                    "each state variable"
                )
            return after

        return call
