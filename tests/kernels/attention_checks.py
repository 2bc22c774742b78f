"""What attention must do on any backend and device, held against the float64 reference.

Inputs are drawn in float64 and rounded to the type of `Where`; errors of outputs and gradients,
over the size of what is expected, stay below its limit.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from rondo.kernels import attention
from rondo.tests.kernels.test_attention import documents, make, run
from rondo.tests.numerics import assert_ratio, gradients

SHAPES = ((1, 9), (11, 11), (11, 17), (300, 333))
"""Queries and keys; lengths that no block divides, and a cache in front."""


def assert_near(name: str, actual: Tensor, expected: Tensor, limit: float) -> None:
    """RMS of the difference within `limit` of the RMS of what is expected, or of 0.1: gradients of
    q and k are differences of numbers near 1, each rounded, and zero where one key is seen."""
    size = expected.square().mean().sqrt().clamp_min(0.1)
    error = (actual.double() - expected).square().mean().sqrt()
    assert error <= limit * size, f"{name}: error {error:.2e} of {size:.2e}, limit {limit:.1e}"


class Where(NamedTuple):
    """What runs the operator, and how exact it must be."""

    backend: str
    device: str
    dtype: torch.dtype
    limit: float

    def moved(self, *tensors: Tensor) -> list[Tensor]:
        return [x.to(self.device, self.dtype) for x in tensors]


def inputs(time: int, keys: int | None = None, *, groups: int = 2, dim: int = 16) -> list[Tensor]:
    """q, k, v with equal head dims, which flash-attn needs."""
    return make(time, keys, groups=groups, dim=dim, values=dim)


def check_reference(
    where: Where, shape: tuple[int, int], window: int | None, packed: bool, groups: int
) -> None:
    """Outputs and gradients of the reference, with grouped heads, windows, documents, a cache."""
    qkv, ids = inputs(*shape, groups=groups), documents(shape[1]) if packed else None
    rounded = where.moved(*qkv)
    exact = [x.cpu().double() for x in rounded]
    expected = gradients(run("reference", window, ids, shape[0]), exact)
    there = None if ids is None else ids.to(where.device)
    actual = gradients(run(where.backend, window, there, shape[0]), rounded)
    assert {y.dtype for y in (*actual[0], *actual[1])} == {where.dtype}
    for name, got, want in zip(
        "oqkv", (*actual[0], *actual[1]), (*expected[0], *expected[1]), strict=True
    ):
        assert_near(name, got.cpu(), want, where.limit)


def check_scale(where: Where) -> None:
    """A scale of the caller's."""
    rounded = where.moved(*inputs(20))
    expected = attention(*(x.cpu().double() for x in rounded), scale=0.7, backend="reference")
    actual = attention(*rounded, scale=0.7, backend=where.backend)
    assert_ratio("o", actual.cpu(), expected, where.limit)


def check_cache(where: Where) -> None:
    """A sequence in two calls, the second with the keys of the first in front."""
    q, k, v = where.moved(*inputs(13))
    ids = documents(13).to(where.device)
    whole = run(where.backend, 5, ids, 13)(q, k, v)[0]
    for split in (1, 6, 12):
        head = run(where.backend, 5, ids[:, :split], split)(*(x[:, :split] for x in (q, k, v)))
        tail = run(where.backend, 5, ids, 13 - split)(q[:, split:], k, v)
        assert_ratio("o", torch.cat([head[0], tail[0]], 1), whole, where.limit)


def check_separate(where: Where) -> None:
    """Documents packed in a row equal the same documents alone."""
    q, k, v = where.moved(*inputs(14))
    bounds = (0, 5, 6, 14)
    ids = torch.cat([torch.full((2, b - a), a) for a, b in itertools.pairwise(bounds)], 1)
    packed = run(where.backend, 3, ids.to(where.device), 14)(q, k, v)[0]
    pieces = [
        run(where.backend, 3)(q[:, a:b], k[:, a:b], v[:, a:b])[0]
        for a, b in itertools.pairwise(bounds)
    ]
    assert_ratio("o", packed, torch.cat(pieces, 1), where.limit)


def check_other_documents(where: Where) -> None:
    """What one document holds does not change another, nor does what comes later."""
    q, k, v = where.moved(*inputs(200))
    ids = (torch.arange(200, device=where.device) >= 150).long().expand(2, 200)
    before = run(where.backend, None, ids, 200)(q, k, v)[0]
    for x in (q, k, v):
        x[:, :150] += 3
    after = run(where.backend, None, ids, 200)(q, k, v)[0]
    assert not torch.equal(before[:, :150], after[:, :150])
    assert torch.equal(before[:, 150:], after[:, 150:])
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = run(where.backend)(*leaves)[0]
    for grad in torch.autograd.grad(out[:, 7].sum(), leaves):
        assert torch.equal(grad[:, 8:], torch.zeros_like(grad[:, 8:]))


def check_large_scores(where: Where) -> None:
    """Scores of a million, in float16 of ten thousand, give neither infinity nor no number."""
    size = 30 if where.dtype == torch.float16 else 300
    q, k, v = inputs(150)
    found = gradients(run(where.backend, 9), where.moved(q * size, k * size, v))
    assert all(y.isfinite().all() for y in (*found[0], *found[1]))
