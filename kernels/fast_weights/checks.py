"""What `fast_weights` refuses."""

from __future__ import annotations

from torch import Tensor

from rondo.kernels.fast_weights.state import (
    FastWeights,
    FastWeightState,
    fast_weight_state_shapes,
)
from rondo.kernels.tiles import values_are_known

UPDATES = ("muon", "gradient")
ORDERS = ("apply_then_update", "update_then_apply")


def check_tokens(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    learning_rates: Tensor,
    momentum: Tensor | None,
) -> None:
    """Raises ValueError for sequences that do not fit together."""
    for name, x in (("k", k), ("v", v)):
        if x.dim() != 4 or not x.is_floating_point() or x.shape[1] == 0:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)} and dtype {x.dtype}, expected floating point "
                "(batch, time, heads, dim) with at least one position"
            )
    tokens = tuple(v.shape[:3])
    _expect("k", k, "(B, T, H, K)", (*tokens, k.shape[3]))
    _expect("q", q, "(B, T, H, K)", tuple(k.shape))
    _expect("learning_rates", learning_rates, "(B, T, H, 3)", (*tokens, 3))
    if momentum is not None:
        _expect("momentum", momentum, "(B, T, H)", tokens)


def check_ids(segment_ids: Tensor | None, batch: int, time: int) -> None:
    """Raises ValueError for anything but integers `(B, T)`."""
    if segment_ids is not None and (
        tuple(segment_ids.shape) != (batch, time)
        or segment_ids.is_floating_point()
        or segment_ids.is_complex()
    ):
        raise ValueError(
            f"segment_ids has shape {tuple(segment_ids.shape)} and dtype {segment_ids.dtype}, "
            f"expected integers (B, T) = {(batch, time)}"
        )


def check_weights(k: Tensor, v: Tensor, weights: FastWeights) -> None:
    """Raises ValueError for weights `(H, ...)` that do not fit the keys and values."""
    if weights.gate.dim() != 3:
        raise ValueError(
            f"weights.gate has shape {tuple(weights.gate.shape)}, expected 3 dims (H, F, K)"
        )
    heads, key_dim, value_dim = k.shape[2], k.shape[3], v.shape[3]
    hidden = weights.gate.shape[1]
    _expect("weights.gate", weights.gate, "(H, F, K)", (heads, hidden, key_dim))
    _expect("weights.up", weights.up, "(H, F, K)", (heads, hidden, key_dim))
    _expect("weights.down", weights.down, "(H, V, F)", (heads, value_dim, hidden))


def check_options(update: str, order: str, chunk_size: int) -> None:
    """Raises ValueError for unknown names and chunks without tokens."""
    for name, value, known in (("update", update, UPDATES), ("order", order, ORDERS)):
        if value not in known:
            raise ValueError(f"{name} is {value!r}, expected one of {', '.join(known)}")
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}, expected at least 1")


def check_state(
    state: FastWeightState,
    batch: int,
    weights: FastWeights,
    has_momentum: bool,
    chunk_size: int,
) -> None:
    """Raises ValueError for a state that other weights or options have left."""
    heads, hidden, key_dim = weights.gate.shape
    value_dim = weights.down.shape[1]
    shapes = fast_weight_state_shapes(
        batch, heads, key_dim, value_dim, hidden, momentum=has_momentum
    )
    for name, x in state._asdict().items():
        expected = shapes[name][0] if name in shapes else None
        actual = None if x is None else tuple(x.shape)
        if actual != expected:
            raise ValueError(
                f"initial_state.{name} has shape {actual}, expected {expected} "
                f"{'with' if has_momentum else 'without'} momentum"
            )
    if values_are_known(state.count) and state.count.max() >= chunk_size:
        raise ValueError(
            f"initial_state.count has {int(state.count.max())} tokens of an open chunk: the state "
            f"was made with another chunk_size than {chunk_size}"
        )


def _expect(name: str, x: Tensor, letters: str, shape: tuple[int, ...]) -> None:
    if tuple(x.shape) != shape or not x.is_floating_point():
        raise ValueError(
            f"{name} has shape {tuple(x.shape)} and dtype {x.dtype}, expected floating point "
            f"{letters} = {shape}"
        )
