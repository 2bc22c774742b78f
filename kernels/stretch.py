"""Runs an operator in two steps, between which the state before its tokens is found.

The first step makes what the tokens do to any state (`summary.py`), and whatever the second needs
as well; the second, given that state S, makes the outputs. Two autograd nodes stand for them. On
the way back the second runs first, with the gradient of the outputs alone, and all it gives is the
gradient of S, which other ranks wait for. What they answer, the gradient dE of the state E that the
tokens leave, is the last thing missing for the gradients of the inputs: the first step's node makes
these in one go.

The state after the tokens is `M S + E`: the gradient of M is `dE S^T`, or the same elementwise, and
derivatives taken at the states that S leads to hold it already. M is therefore a constant here, and
may be applied to S only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rondo.kernels.summary import DiagonalSummary, MatrixSummary, Stretch


class Steps(NamedTuple):
    """Of an operator with `inputs`, tensors or None, and `options`, which are not tensors."""

    begin: Callable[..., tuple[Tensor, ...]]
    """(*inputs, *options) -> M, E, and tensors kept for `finish`."""
    finish: Callable[..., Tensor]
    """(S, *kept, *inputs, *options) -> outputs."""
    reverse: Callable[..., tuple[Tensor, ...]]
    """(S, gradient of outputs, *saved, *inputs, *options) -> gradient of S, and what `gradients` is
    given of it. With `outputs` they come after their gradient."""
    gradients: Callable[..., tuple[Tensor | None, ...]]
    """(gradient of E or None, *given or None each, *inputs, *options) -> those of the inputs."""
    shapes: Callable[..., tuple[tuple[torch.Size, torch.dtype], ...]]
    """(E, *kept, *inputs) -> shapes and dtypes of what `gradients` is given by `reverse`."""
    kept: int
    """How many tensors `begin` keeps."""
    saved: int
    """How many of the kept, first ones, `reverse` needs too."""
    outputs: bool = False
    """Whether `reverse` needs the outputs."""


def stretch(
    steps: Steps,
    summary: type[DiagonalSummary] | type[MatrixSummary],
    inputs: tuple[Tensor | None, ...],
    options: tuple[Any, ...],
) -> Stretch:
    """Takes the first step; see the top of this file."""
    state, transition, *rest = _Begin.apply(steps, options, *inputs)
    found = summary(transition, state)

    def finish(first: Tensor) -> tuple[Tensor, Tensor]:
        first = first.to(state.dtype)
        o = _Finish.apply(steps, options, len(inputs), first, *inputs, *rest)
        return o, found.apply(first)

    return Stretch(found, finish)


class _Begin(torch.autograd.Function):
    """`(steps, options, *inputs)` -> E, M, what is kept, and a tensor without memory for each that
    comes back from `_Finish` as its gradient."""

    @staticmethod
    def forward(ctx: Any, steps: Steps, options: tuple[Any, ...], *inputs: Any) -> Any:
        transition, state, *kept = steps.begin(*inputs, *options)
        ctx.save_for_backward(*inputs)
        ctx.steps, ctx.options = steps, options
        ctx.mark_non_differentiable(transition, *kept)
        ctx.set_materialize_grads(False)
        carriers = [
            torch.zeros((), dtype=dtype, device=state.device).expand(shape)
            for shape, dtype in steps.shapes(state, *kept, *inputs)
        ]
        return state, transition, *kept, *carriers

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        inputs = ctx.saved_tensors
        found = ctx.steps.gradients(grads[0], *grads[2 + ctx.steps.kept :], *inputs, *ctx.options)
        return None, None, *found


class _Finish(torch.autograd.Function):
    """`(steps, options, number of inputs, S, *inputs, *kept, *carriers)` -> outputs."""

    @staticmethod
    def forward(
        ctx: Any, steps: Steps, options: tuple[Any, ...], count: int, first: Tensor, *rest: Any
    ) -> Tensor:
        inputs, kept = rest[:count], rest[count : count + steps.kept]
        o = steps.finish(first, *kept, *inputs, *options)
        saved = (*((o,) if steps.outputs else ()), *kept[: steps.saved])
        ctx.save_for_backward(first, *saved, *inputs)
        ctx.steps, ctx.options, ctx.others = steps, options, len(rest)
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        first, *saved = ctx.saved_tensors
        dfirst, *given = ctx.steps.reverse(first, grad, *saved, *ctx.options)
        nothing = [None] * (ctx.others - len(given))
        return None, None, None, dfirst, *nothing, *given
