"""AdamW's state in a checkpoint, for engines that keep it in pieces of their own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor
from torch.distributed.tensor import DTensor

from rondo.errors import UserError

MOMENTS = ("exp_avg", "exp_avg_sq")
"""State of AdamW that has its parameter's shape."""


def common_step(states: Mapping[str, Tensor], names: Iterable[str], engine: str) -> float:
    """How many steps all parameters have made. Raises UserError where they differ: `engine`
    counts them for all."""
    steps = {name: float(states[f"{name}.step"]) for name in names}
    few, many = min(steps, key=steps.__getitem__), max(steps, key=steps.__getitem__)
    if steps[few] != steps[many]:
        raise UserError(
            f"parallel.engine: {engine} counts the steps of all parameters alike, but {few} "
            f"has made {steps[few]:.0f} and {many} {steps[many]:.0f}; go on with native"
        )
    return steps[few]


def whole(value: Tensor) -> Tensor:
    """All of a tensor. Collective for a DTensor."""
    return value.full_tensor() if isinstance(value, DTensor) else value
