"""One chunk of a neural memory: what it learns, the derivative of that, and what tokens read.

N = B H rows. A layer's state is `(N, 2 in, out)`: transposed weights over transposed momentum.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rondo.kernels.neural_memory.layers import Matrices

silu_backward = torch.ops.aten.silu_backward


class Learned(NamedTuple):
    """What a memory takes from one chunk, or from several `(g, N, ...)`; a list has an entry a
    layer."""

    inputs: list[Tensor]
    """a `(N, C, in)`; the first are the keys."""
    errors: list[Tensor]
    """δ `(N, C, out)`; the gradient of a token is `a δᵀ`."""
    products: list[Tensor]
    """What SiLU is taken of, for all layers but the last `(N, C, out)`."""
    returned: list[Tensor]
    """What comes back to the outputs of these layers `(N, C, out)`: δ before SiLU's slope."""


def learn(weights: Matrices, k: Tensor, target: Tensor) -> Learned:
    """Inputs and errors on keys k `(N, C, D)` at `weights` `(N, in, out)`; `target` is -2 times
    what the layers are to give."""
    inputs, products = [k], []
    for w in weights[:-1]:
        products.append(torch.bmm(inputs[-1], w))
        inputs.append(F.silu(products[-1]))
    errors, returned = [torch.baddbmm(target, inputs[-1], weights[-1], alpha=2)], []
    for w, z in zip(weights[:0:-1], products[::-1], strict=True):
        returned.insert(0, torch.bmm(errors[0], w.mT))
        errors.insert(0, silu_backward(returned[0], z))
    return Learned(inputs, errors, products, returned)


def learned_again(k: Tensor, inner: list[list[Tensor]], error: Tensor) -> Learned:
    """From what the forward pass has kept: `products`, `returned`, and the last of `errors`."""
    products, returned = inner
    errors = [*(silu_backward(h, z) for h, z in zip(returned, products, strict=True)), error]
    return Learned([k, *(F.silu(z) for z in products)], errors, products, returned)


def learn_backward(
    weights: Matrices,
    at: Learned,
    bends: list[Tensor],
    to_inputs: list[Tensor],
    to_errors: list[Tensor],
    to_weights: list[Tensor],
) -> None:
    """Adds in place to the gradients of `weights`, keys (the first inputs) and target (the last
    errors) what reaches them through inputs and errors. `bends`: `returned` times SiLU's second
    derivative."""
    to_products = []
    for i, z in enumerate(at.products):
        back = silu_backward(to_errors[i], z)
        to_products.append(to_errors[i] * bends[i])
        to_errors[i + 1].baddbmm_(back, weights[i + 1])
        to_weights[i + 1].baddbmm_(back.mT, at.errors[i + 1])
    upper, scale = to_errors[-1], 2
    for i in reversed(range(len(weights))):
        to_weights[i].baddbmm_(at.inputs[i].mT, upper, alpha=scale)
        to_inputs[i].baddbmm_(upper, weights[i].mT, alpha=scale)
        if i:
            upper, scale = (
                to_products[i - 1].add_(silu_backward(to_inputs[i], at.products[i - 1])),
                1,
            )


def bend(z: Tensor) -> Tensor:
    """Second derivative of SiLU."""
    sigmoid = z.sigmoid()
    return sigmoid * (1 - sigmoid) * (2 + z * (1 - 2 * sigmoid))


def update_norms(inputs: list[Tensor], errors: list[Tensor]) -> Tensor:
    """`||a δᵀ||` of every layer and token `(L, ..., C)`, float64: errors of a memory that runs
    away have squares that no float32 holds."""
    norms = (
        torch.stack([torch.linalg.vector_norm(x, dim=-1, dtype=torch.float64) for x in each])
        for each in (inputs, errors)
    )
    return next(norms) * next(norms)


def limited_errors(errors: list[Tensor], factors: Tensor) -> list[Tensor]:
    """δ `(..., C, out)` of every layer times `factors` `(L, ..., C)`. The limit scales errors, not
    rates: products with what has not been scaled may overflow."""
    return [error * factor[..., None] for error, factor in zip(errors, factors, strict=True)]


def limit_backward(by: Tensor, x: Tensor, to_x: Tensor) -> None:
    """Adds what the limit of updates takes from the gradient of inputs or errors x `(N, C, ...)`:
    `by x / ||x||²`, `by` `(N, C)`."""
    norms = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float64)
    to_x -= (x * (by[..., None] / norms.square().clamp_min(1e-300))).to(x.dtype)


def weighted(x: Tensor, by: Tensor) -> Tensor:
    """`(..., C, 2 in)`: x `(..., C, in)` twice, by the one and the other of `by` `(..., C, 2)`."""
    return (x[..., None, :] * by[..., None]).flatten(-2)


def advance(state: Tensor, carried: Tensor, written: Tensor, error: Tensor, out: Tensor) -> None:
    """Puts into `out` a layer's state after a chunk: `carried` `(N, 3)` as `_gates` makes it,
    `written` the inputs for weights and momentum `(N, C, 2 in)`."""
    rows = len(state)
    torch.mul(state.view(rows, 2, -1), carried[:, :2, None], out=out.view(rows, 2, -1))
    width = state.shape[1] // 2
    out[:, :width].addcmul_(state[:, width:], carried[:, 2:, None])
    torch.baddbmm(out, written.mT, error, alpha=-1, out=out)


def advance_backward(state: Tensor, carried: Tensor, to_out: Tensor, to_state: Tensor) -> Tensor:
    """Adds the gradient of `state` in place, without that of `written`; returns that of
    `carried`."""
    both, width = carried[:, :2, None], state.shape[1] // 2
    halves, to_halves = (x.view(len(x), 2, -1) for x in (state, to_out))
    to_state.view(len(state), 2, -1).addcmul_(to_halves, both)
    to_state[:, width:].addcmul_(to_out[:, :width], carried[:, 2:, None])
    dots = torch.bmm(to_halves, halves.mT)
    return torch.stack([dots[:, 0, 0], dots[:, 1, 1], dots[:, 0, 1]], -1)


def scale(state: Tensor, scales: Tensor) -> None:
    """Multiplies a layer's weights and momentum by `scales` `(N, 2)`, in place."""
    state.view(len(state), 2, -1).mul_(scales[..., None])


class Passes(NamedTuple):
    """What goes over the whole state of a layer."""

    advance: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], None] = advance
    advance_backward: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] = advance_backward
    scale: Callable[[Tensor, Tensor], None] = scale


TORCH = Passes()


class Reads(NamedTuple):
    """What tokens of g chunks read from, or the gradients of that; a list has an entry a layer."""

    q: Tensor
    """`(g, N, C, D)`."""
    spread: Tensor
    """A of the chunks `(g, N, C, C)`."""
    reading: Tensor
    """β and P `(g, N, C, 2)`."""
    rate: Tensor
    """Learning rates `(g, N, C)`."""
    inputs: list[Tensor]
    """a `(g, N, C, in)`."""
    errors: list[Tensor]
    """δ as limited `(g, N, C, out)`."""
    states: list[Tensor]
    """As the chunks begin `(g, N, 2 in, out)`."""


def read(at: Reads) -> Tensor:
    """Outputs `(g, N, C, D)`: each token reads with its own and earlier tokens of its chunk."""
    x, by = at.q, at.spread * at.rate[..., None, :]
    for i, (a, error, state) in enumerate(zip(at.inputs, at.errors, at.states, strict=True)):
        x = F.silu(x) if i else x
        scores = (x @ a.mT) * by
        x = weighted(x, at.reading) @ state - scores @ error
    return x


def read_backward(at: Reads, to_o: Tensor) -> Reads:
    """Gradients of all that `read` takes, in tensors of their own."""
    layers = len(at.states)

    def reads(tensors: list[Tensor]) -> Reads:
        lists = [tensors[i : i + layers] for i in range(4, len(tensors), layers)]
        q, spread, reading, rate = tensors[:4]
        return Reads(q, spread, reading, rate, lists[0], lists[1], lists[2])

    flat = [*at[:4], *at.inputs, *at.errors, *at.states]
    leaves = [x.detach().requires_grad_() for x in flat]
    with torch.enable_grad():
        o = read(reads(leaves))
    return reads([x.contiguous() for x in torch.autograd.grad(o, leaves, to_o)])
