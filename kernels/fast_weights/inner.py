"""One chunk of the inner training loop: the sum of gradients, the update, the application.

Three functions, because only the first adds up over tokens: ranks that share the tokens of a chunk
sum what `gradient_sum` returns (and the momenta) over each other, and then update and apply alone;
they may divide the matrices to orthogonalise.

Letters in shapes: B batch, H heads, C tokens of a chunk, K, V and F widths of keys, values and the
hidden layer. Queries are read by products in their own dtype; all that changes the weights is
computed in the dtype of the weights. An orthogonalised step lifts singular values of a thousandth
of the largest up to the others, so that in bfloat16 it would make noise as large as the signal.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from rondo.kernels.fast_weights.newton_schulz import newton_schulz
from rondo.kernels.fast_weights.state import FastWeights

NORM_EPS = 1e-5


def read(a: Tensor, u: Tensor, wide: torch.dtype) -> Tensor:
    """`SiLU(a) u` in the dtype of `a`, computed in `wide`."""
    return (F.silu(a.to(wide)) * u.to(wide)).to(a.dtype)


def parts(a: Tensor, u: Tensor, d: Tensor, rates: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What the three sums of `gradient_sum` are products of, with k, k and v; rates `(.., 3)`."""
    s = torch.sigmoid(a)
    silu = a * s
    gate, up, down = rates.split(1, dim=-1)
    return gate * d * u * (s + silu * (1 - s)), up * d * silu, down * silu * u


def renew(weights: Tensor, step: Tensor, initial: Tensor) -> Tensor:
    """`N(weights + step)`, N being `restore_norms`."""
    return restore_norms(weights + step, initial)


class Passes(NamedTuple):
    """What stands between the products."""

    read: Callable[[Tensor, Tensor, torch.dtype], Tensor] = read
    parts: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]] = parts
    renew: Callable[[Tensor, Tensor, Tensor], Tensor] = renew


TORCH = Passes()


def apply_weights(weights: FastWeights, x: Tensor, passes: Passes = TORCH) -> Tensor:
    """`down (SiLU(gate x) * up x)`: `(B, H, C, K)` to `(B, H, C, V)`, in the dtype of `x`."""
    gate, up, down = weights.map(lambda w: w.to(x.dtype))
    return passes.read(x @ gate.mT, x @ up.mT, weights.gate.dtype) @ down.mT


def gradient_sum(
    weights: FastWeights, k: Tensor, v: Tensor, learning_rates: Tensor, passes: Passes = TORCH
) -> FastWeights:
    """Gradient of `sum_i rate_i f(k_i) . v_i` at `weights`, each matrix with rates of its own.

    With `a = gate k`, `u = up k`, `s = sigmoid(a)` and `d = down^T v` of a token, it is the sum of

        gate: (rate d u s (1 + a (1 - s))) k^T    up: (rate d a s) k^T    down: rate v (a s u)^T

    Args:
        weights: `(B, H, ...)`.
        k, v: `(B, H, C, K)` and `(B, H, C, V)`.
        learning_rates: `(B, H, C, 3)` in the dtype of the weights: of gate, up and down.

    Returns:
        `(B, H, ...)`: what a plain update adds to the weights.
    """
    k, v = k.to(learning_rates.dtype), v.to(learning_rates.dtype)
    a, u, d = k @ weights.gate.mT, k @ weights.up.mT, v @ weights.down
    gate, up, hidden = passes.parts(a, u, d, learning_rates)
    return FastWeights(gate=gate.mT @ k, up=up.mT @ k, down=v.mT @ hidden)


def update_weights(
    weights: FastWeights,
    gradient: FastWeights,
    initial: FastWeights,
    buffer: FastWeights | None,
    momentum: Tensor | None,
    update: str,
    orthogonalise: Callable[[Tensor], Tensor] = newton_schulz,
    passes: Passes = TORCH,
) -> tuple[FastWeights, FastWeights | None]:
    """The weights after a chunk, and the momentum buffer: `m <- momentum m + gradient`,
    `W <- N(W + m)` or, for "muon", `W <- N(W + newton_schulz(m))`; without momentum m is the
    gradient. N is `restore_norms`.

    Args:
        weights, gradient, buffer: `(B, H, ...)`.
        initial: `(H, ...)`, whose rows set the norms.
        momentum: `(B, H)`, the mean over the chunk.
        update: "muon" or "gradient".
        orthogonalise: how `newton_schulz` of matrices `(B, H, ., .)` is computed.
    """
    step = gradient
    if momentum is not None and buffer is not None:
        decay = momentum[..., None, None]
        buffer = buffer.map(lambda m, g: torch.addcmul(g, decay, m), gradient)
        step = buffer
    if update == "muon":
        step = step.map(orthogonalise)
    return weights.map(passes.renew, step, initial), buffer


def restore_norms(w: Tensor, initial: Tensor) -> Tensor:
    """`w` with every row (what makes one output) scaled to the norm it has in `initial`.

    `w sqrt((|initial|^2 + eps^2) / (|w|^2 + eps^2))`: exactly 1 where nothing has changed, smooth
    at rows of zero, which stay below eps.
    """
    norm, target = (x.square().sum(-1, keepdim=True) + NORM_EPS**2 for x in (w, initial))
    return w * (target / norm).sqrt()
