"""Inputs and comparisons of the tests of fast weights."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from rondo.kernels.fast_weights import (
    FastWeights,
    FastWeightState,
    apply_weights,
    fast_weights,
)
from rondo.tests import numerics

UPDATES = ("muon", "gradient")
ORDERS = ("apply_then_update", "update_then_apply")
BACKENDS = ("chunked", "reference")
HEADS, K, V, HIDDEN = 2, 4, 3, 5
NAMES = ("q", "k", "v", "learning_rates", "gate", "up", "down", "momentum")

every_update = pytest.mark.parametrize("update", UPDATES)
every_order = pytest.mark.parametrize("order", ORDERS)
every_backend = pytest.mark.parametrize("backend", BACKENDS)
close = functools.partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)


class Case(NamedTuple):
    """Inputs of the operator; None where the case goes without."""

    q: Tensor
    k: Tensor
    v: Tensor
    learning_rates: Tensor
    weights: FastWeights
    momentum: Tensor | None
    state: FastWeightState | None
    ids: Tensor | None

    def tensors(self) -> list[Tensor]:
        """All floating point inputs."""
        state = () if self.state is None else self.state
        every = (*self[:4], *self.weights, self.momentum, *state)
        return [x for x in every if x is not None and x.is_floating_point()]

    def rebuilt(self, tensors: Sequence[Tensor]) -> Case:
        rest = iter(tensors)
        sequences = [next(rest) for _ in range(4)]
        weights = FastWeights(*(next(rest) for _ in range(3)))
        momentum = None if self.momentum is None else next(rest)
        state = self.state
        if state is not None:
            state = FastWeightState._make(
                next(rest) if x is not None and x.is_floating_point() else x for x in state
            )
        return Case(*sequences, weights, momentum, state, self.ids)

    def part(self, part: slice) -> Case:
        """Some positions."""
        cut = [None if x is None else x[:, part] for x in (*self[:4], self.momentum, self.ids)]
        return self._replace(
            q=cut[0], k=cut[1], v=cut[2], learning_rates=cut[3], momentum=cut[4], ids=cut[5]
        )

    def run(self, *tensors: Tensor, **options: object) -> tuple[Tensor, FastWeightState]:
        case = self.rebuilt(tensors) if tensors else self
        return fast_weights(
            *case[:5],
            momentum=case.momentum,
            initial_state=case.state,
            segment_ids=case.ids,
            **options,
        )

    def flat(self, *tensors: Tensor, **options: object) -> list[Tensor]:
        """Outputs and the floating point part of the state."""
        o, state = self.run(*tensors, **options)
        return [o, *floats(state)]


def gradients(
    function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """`numerics.gradients` with outputs that may depend on nothing (the sums of a full chunk)."""

    def attached(*tensors: Tensor) -> list[Tensor]:
        outputs = function(*tensors)
        return [y if y.requires_grad else y + 0 * tensors[0].sum() for y in outputs]

    return numerics.gradients(attached, inputs)


def floats(state: FastWeightState) -> list[Tensor]:
    return [x for x in state if x is not None and x.is_floating_point()]


def make(
    time: int,
    *,
    dims: tuple[int, int, int] = (K, V, HIDDEN),
    dtype: torch.dtype = torch.float64,
    documents: float = 0.0,
    momentum: bool = True,
    open_tokens: tuple[int, int] | None = None,
    seed: int = 0,
) -> Case:
    """A batch of 2 rows; `documents` is the chance that a position starts a document, and
    `open_tokens` how many tokens of an open chunk the state of each row has, None for no state."""
    generator = torch.Generator().manual_seed(seed)
    draw = functools.partial(torch.randn, generator=generator, dtype=torch.float64)
    key_dim, value_dim, hidden = dims
    wide = torch.promote_types(dtype, torch.float32)
    q, k = (F.normalize(draw(2, time, HEADS, key_dim), dim=-1).to(dtype) for _ in range(2))
    v = draw(2, time, HEADS, value_dim).to(dtype)
    rates = (0.1 * draw(2, time, HEADS, 3).exp()).to(wide)
    shapes = ((hidden, key_dim), (hidden, key_dim), (value_dim, hidden))
    weights = FastWeights(*(draw(HEADS, *s).mul(s[1] ** -0.5).to(wide) for s in shapes))
    mixing = draw(2, time, HEADS).sigmoid().to(wide) if momentum else None
    state = None
    if open_tokens is not None:
        matrices = (2, HEADS, hidden, 2 * key_dim + value_dim)
        parts = [x.to(wide) for x in (draw(matrices), draw(matrices))]
        extra = [draw(matrices).to(wide), draw(2, HEADS).sigmoid().to(wide)] if momentum else []
        state = FastWeightState(*parts, torch.tensor(open_tokens), *extra)
    ids = (torch.rand(2, time, generator=generator) < documents).cumsum(1) if documents else None
    return Case(q, k, v, rates, weights, mixing, state, ids)


def packed(case: Case, lengths: Sequence[int]) -> Case:
    """The case with documents of these lengths in every row."""
    numbers = torch.tensor([3 * n + n % 2 for n in range(len(lengths))])
    return case._replace(ids=torch.repeat_interleave(numbers, torch.tensor(lengths)).expand(2, -1))


def same(actual: tuple[Tensor, FastWeightState], expected: tuple[Tensor, FastWeightState]) -> None:
    close(actual[0], expected[0])
    for x, y in zip(actual[1], expected[1], strict=True):
        if x is not None or y is not None:
            close(x, y)


def per_head(case: Case) -> tuple[FastWeights, list[Tensor]]:
    """Weights `(2, H, ...)`, and k, v and learning rates `(2, H, T, .)`."""
    tokens = [x.transpose(1, 2) for x in (case.k, case.v, case.learning_rates)]
    return case.weights.map(lambda w: w.expand(2, -1, -1, -1)), tokens


def static(case: Case) -> Tensor:
    return apply_weights(case.weights, case.q.transpose(1, 2)).transpose(1, 2)
