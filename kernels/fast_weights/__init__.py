"""Fast weights trained while they read: large-chunk test-time training (arXiv 2505.23884).

Every head of every sequence has a small network of its own, which takes one step of training a
chunk of tokens: towards giving the values of the chunk when asked with its keys.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from rondo.kernels.backend import choose, full_precision, triton_refusal
from rondo.kernels.fast_weights.checks import (
    check_ids,
    check_options,
    check_state,
    check_tokens,
    check_weights,
)
from rondo.kernels.fast_weights.chunked import Share, chunked
from rondo.kernels.fast_weights.inner import apply_weights, gradient_sum, update_weights
from rondo.kernels.fast_weights.newton_schulz import newton_schulz
from rondo.kernels.fast_weights.reference import reference
from rondo.kernels.fast_weights.state import (
    FastWeights,
    FastWeightState,
    fast_weight_state_shapes,
)

__all__ = [
    "FastWeightState",
    "FastWeights",
    "Share",
    "apply_weights",
    "fast_weight_state_shapes",
    "fast_weights",
    "gradient_sum",
    "newton_schulz",
    "update_weights",
]

LONGEST = 8192
"""Numbers of a row of a matrix that a Triton kernel holds."""


def _triton(*arguments: Any, **options: Any) -> tuple[Tensor, FastWeightState]:
    from rondo.kernels.fast_weights import triton

    return triton.fast_weights(*arguments, **options)


_IMPLEMENTATIONS = {"chunked": chunked, "reference": reference, "triton": _triton}
_SHARED = ("chunked", "triton")


def fast_weights(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    learning_rates: Tensor,
    weights: FastWeights,
    *,
    momentum: Tensor | None = None,
    update: str = "muon",
    order: str = "apply_then_update",
    initial_state: FastWeightState | None = None,
    segment_ids: Tensor | None = None,
    chunk_size: int = 2048,
    share: Share | None = None,
    backend: str = "auto",
) -> tuple[Tensor, FastWeightState]:
    """Reads `f_W(q) = down (SiLU(gate q) * up q)`, and trains W by a step a chunk of tokens:

        g = sum_i over the chunk of the gradient of rate_i f_W(k_i) . v_i   at the W it starts with
        m <- beta m + g      W <- N(W + newton_schulz(m))   or, for "gradient",   W <- N(W + m)

    N gives every row the norm that it has in `weights`; beta is the mean of `momentum` over the
    chunk, and 0 without. Chunks count from the start of a document, where W is `weights` and m is
    0. The sum is over tokens, whatever their order in the chunk. Reads are products in the dtype of
    `v`; gradients and updates are float32 (float64 for float64 inputs).

    Args:
        q, k: `(B, T, H, K)`, cast to the dtype of `v`; keys and queries of length 1 are usual.
        v: `(B, T, H, V)`.
        learning_rates: `(B, T, H, 3)`, at least 0, of gate, up and down; keep them float32. With
            "muon" they only weigh tokens against each other; 0 leaves a token out of the sum.
        weights: gate `(H, F, K)`, up `(H, F, K)`, down `(H, V, F)`: where every document starts.
        momentum: `(B, T, H)` in [0, 1], or None.
        update: "muon", orthogonalised steps, or "gradient", the sums themselves.
        order: "apply_then_update": a token reads what the chunks before its own have left, which
            is causal. "update_then_apply": it reads what its own chunk has left too, so it sees
            later tokens of the chunk; a chunk that a document or the call cuts short counts with
            the tokens it has.
        initial_state: after an earlier call with the same weights and options, of the document of
            position 0. Calls may be cut anywhere; with "update_then_apply", tokens of a chunk
            that is cut do not see the part in the later call.
        segment_ids: `(B, T)` integers, non-decreasing in a row, one id a document.
        chunk_size: tokens between two updates. It is part of the model, and a state belongs to
            the chunk_size that it was made with.
        share: which of the tokens these are when ranks share them; then `segment_ids` `(B, P T)`
            is that of all P ranks' tokens, weights and `initial_state` are the same on all, the
            state returned too, and each has its part of their gradients. None: all of them.
        backend: "auto", "reference", "chunked" or "triton"; for a share not "reference".

    Returns:
        o `(B, T, H, V)` in the dtype of `v`, and the state after the last position, float32
        (float64 for float64 inputs). Differentiable in every floating point input, through every
        inner step.

    Raises:
        ValueError: a shape, dtype or option does not fit.
    """
    weights = FastWeights(*weights)
    check_tokens(q, k, v, learning_rates, momentum)
    check_ids(segment_ids, v.shape[0], v.shape[1] * (1 if share is None else share.size))
    check_weights(k, v, weights)
    check_options(update, order, chunk_size)
    if initial_state is not None:
        check_state(initial_state, v.shape[0], weights, momentum is not None, chunk_size)
    refusal = _refusal(q, k, v, learning_rates, *weights, momentum, *(initial_state or ()))
    if share is None:
        run = choose("fast_weights", backend, _IMPLEMENTATIONS, v.device, refusal)
    else:
        of_share = {n: functools.partial(_IMPLEMENTATIONS[n], share=share) for n in _SHARED}
        name = f"fast_weights over {share.size} ranks"
        run = choose(name, backend, of_share, v.device, refusal)
    wide = torch.promote_types(v.dtype, torch.float32)
    state = None if initial_state is None else initial_state.to(wide)
    momentum = None if momentum is None else momentum.to(wide)
    rates, q, k = learning_rates.to(wide), q.to(v.dtype), k.to(v.dtype)
    initial = weights.map(lambda w: w.to(wide))
    options = (update, order, chunk_size)
    with full_precision(v.device):
        return run(q, k, v, rates, initial, momentum, state, segment_ids, options)


def _refusal(*tensors: Tensor | None) -> str | None:
    """Why no Triton kernel takes these tensors, weights from the fifth to the seventh, or None."""
    longest = max(w.shape[-1] for w in tensors[4:7] if w is not None)
    if longest > LONGEST:
        return f"it holds rows of matrices of at most {LONGEST} numbers, got {longest}"
    return triton_refusal(*tensors)
