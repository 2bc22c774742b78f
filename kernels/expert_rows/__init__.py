"""The way of tokens to their experts and back: rows in the order of experts, and sums of them.

Letters: n tokens, k experts a token, m rows. A choice is a token's slot, number `token · k + slot`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from rondo.kernels.backend import choose, triton_refusal
from rondo.kernels.expert_rows import chunked, reference

__all__ = ["combine_rows", "gather_rows"]


def _triton_gather(*arguments: Any) -> Tensor:
    from rondo.kernels.expert_rows import triton

    return triton.gather_rows(*arguments)


def _triton_combine(*arguments: Any) -> Tensor:
    from rondo.kernels.expert_rows import triton

    return triton.combine_rows(*arguments)


_GATHER = {
    "chunked": chunked.gather_rows,
    "reference": reference.gather_rows,
    "triton": _triton_gather,
}
_COMBINE = {
    "chunked": chunked.combine_rows,
    "reference": reference.combine_rows,
    "triton": _triton_combine,
}


def gather_rows(
    x: Tensor, order: Tensor, places: Tensor, *, drops: bool = False, backend: str = "auto"
) -> Tensor:
    """`y_r = x[order_r // k]`: the token of each row; of a row of filling the last token.

    Args:
        x: `(n, d)`.
        order: `(m,)` int64: the choice at each row, each at most once; n k for filling.
        places: `(n, k)` int64, the inverse: the row of each choice; m for one that has none.
        drops: whether some choices have no row.
        backend: "auto", "reference", "chunked" or "triton".

    Returns:
        `(m, d)` in the dtype of x, whose gradient does not see the filling. It is summed in
        float32 by "triton".

    Raises:
        ValueError: a shape, dtype or backend does not fit.
    """
    _check("x", x, order, places)
    if len(x) != len(places):
        raise ValueError(f"x has {len(x)} tokens, places {len(places)}: expected equal")
    run = choose("gather_rows", backend, _GATHER, x.device, triton_refusal(x, order, places))
    return run(x, order, places, drops)


def combine_rows(
    y: Tensor,
    order: Tensor,
    places: Tensor,
    weights: Tensor | None = None,
    *,
    drops: bool = False,
    backend: str = "auto",
) -> Tensor:
    """`x_i = Σ_j w_ij y[places_ij]`: for each token the weighted sum over its rows.

    Args:
        y: `(m, d)`; rows of filling are not looked at.
        weights: `(n, k)`, those of choices without a row are not looked at; None for ones.
        order, places, drops, backend: as for `gather_rows`.

    Returns:
        `(n, d)` in the dtype of y, summed in float32 by "triton". Differentiable in y and weights.
        The gradient of y is finite at rows of filling, and has no meaning there.

    Raises:
        ValueError: a shape, dtype or backend does not fit.
    """
    _check("y", y, order, places)
    if len(y) != len(order):
        raise ValueError(f"y has {len(y)} rows, order {len(order)}: expected equal")
    if weights is not None and weights.shape != places.shape:
        raise ValueError(
            f"weights has shape {tuple(weights.shape)}, places {tuple(places.shape)}: "
            "expected equal (n, k)"
        )
    refusal = triton_refusal(y, order, places, weights)
    run = choose("combine_rows", backend, _COMBINE, y.device, refusal)
    return run(y, order, places, weights, drops)


def _check(name: str, x: Tensor, order: Tensor, places: Tensor) -> None:
    if x.dim() != 2 or not x.is_floating_point():
        raise ValueError(
            f"{name} has shape {tuple(x.shape)} and dtype {x.dtype}, expected floating point "
            "(rows, dim)"
        )
    for index, value, dims, shape in (("order", order, 1, "(m,)"), ("places", places, 2, "(n, k)")):
        if value.dim() != dims or value.is_floating_point():
            raise ValueError(
                f"{index} has shape {tuple(value.shape)} and dtype {value.dtype}, expected "
                f"integers {shape}"
            )
