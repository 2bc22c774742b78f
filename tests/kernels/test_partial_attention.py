"""Attention to stretches of keys: each against the definition, merged against the whole."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from rondo.kernels import attention
from rondo.kernels.softmax_attention import partial
from rondo.kernels.softmax_attention.partial import (
    merge_partial,
    partial_attention,
    partial_attention_backward,
)
from rondo.kernels.softmax_attention.visibility import hidden_keys
from rondo.tests.numerics import assert_ratio, gradients

WINDOWS = (None, 1, 3, 7, 30)
OFFSETS = (-20, -4, 0, 3, 9, 25)  # queries wholly before the keys, across, wholly after


@pytest.fixture(params=[128, 4])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partial, "BLOCK", request.param)


def make(
    queries: int, keys: int, *, groups: int = 2, dim: int = 6, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """q, k, v of a batch of two and four query heads."""
    generator = torch.Generator().manual_seed(1)
    shapes = (2, queries, 4, dim), (2, keys, groups, dim), (2, keys, groups, dim - 1)
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]


def documents(time: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return (torch.rand(2, time, generator=generator) < 0.2).cumsum(1)


def definition(
    q: Tensor, k: Tensor, v: Tensor, offset: int, window: int | None, ids: tuple
) -> tuple[Tensor, Tensor]:
    """`(o, lse)` from all scores at once, differentiable; a query without keys gets (0, -inf)."""
    repeat = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(repeat, 2), v.repeat_interleave(repeat, 2)
    hidden = hidden_keys((0, q.shape[1]), (0, k.shape[1]), offset, window, *ids, q.device)[:, None]
    scores = torch.einsum("bthd,bshd->bhts", q, k) * 0.4
    blind = hidden.all(-1, keepdim=True)
    weights = scores.masked_fill(hidden & ~blind, float("-inf")).softmax(-1).masked_fill(blind, 0.0)
    lse = scores.masked_fill(hidden, float("-inf")).logsumexp(-1)
    return torch.einsum("bhts,bshd->bthd", weights, v), lse.transpose(1, 2)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("packed", (False, True))
@pytest.mark.parametrize("groups", (1, 4))
def test_matches_definition(
    block: None, window: int | None, offset: int, packed: bool, groups: int
) -> None:
    """Outputs, log-sum-exps and gradients; zeros and -inf without NaN where nothing is seen."""
    qkv = [x.requires_grad_() for x in make(11, 13, groups=groups)]
    ids = (documents(13)[:, 2:], documents(13)) if packed else (None, None)
    expected, expected_lse = definition(*qkv, offset, window, ids)
    grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(3)).double()
    expected_grads = torch.autograd.grad(expected, qkv, grad)

    place = {"scale": 0.4, "query_start": 40 + offset, "key_start": 40, "window": window}
    place |= {"segment_ids": ids[0], "key_segment_ids": ids[1]}
    qkv = [x.detach() for x in qkv]
    o, lse = partial_attention(*qkv, **place)
    torch.testing.assert_close((o, lse), (expected, expected_lse))
    assert torch.equal(lse == float("-inf"), (o == 0).all(-1))
    grads = partial_attention_backward(grad, *qkv, lse, (grad * o).sum(-1), **place)
    torch.testing.assert_close(grads, expected_grads)


class Stretches(torch.autograd.Function):
    """Whole attention from stretches of keys, each met alone, the last first."""

    @staticmethod
    def forward(ctx, q, k, v, window, ids, bounds):
        dtype = torch.promote_types(q.dtype, torch.float32)
        o = v.new_zeros(*q.shape[:3], v.shape[-1], dtype=dtype)
        lse = q.new_full(q.shape[:3], float("-inf"), dtype=dtype)
        calls = []
        for low, high in reversed(list(itertools.pairwise(bounds))):
            place = {"scale": 0.4, "query_start": 0, "key_start": low, "window": window}
            key_ids = None if ids is None else ids[:, low:high]
            place |= {"segment_ids": ids, "key_segment_ids": key_ids}
            part = partial_attention(q, k[:, low:high], v[:, low:high], **place)
            o, lse = merge_partial(o, lse, *part)
            calls.insert(0, (low, high, place))
        ctx.calls = calls
        ctx.save_for_backward(q, k, v, o, lse)
        return o.to(v.dtype)

    @staticmethod
    def backward(ctx, grad):
        q, k, v, o, lse = ctx.saved_tensors
        delta = (grad.to(o.dtype) * o).sum(-1)
        total, parts = torch.zeros_like(q, dtype=lse.dtype), []
        for low, high, place in ctx.calls:
            kv = k[:, low:high], v[:, low:high]
            grad_q, *grads = partial_attention_backward(grad, q, *kv, lse, delta, **place)
            assert grad_q.dtype == lse.dtype
            total += grad_q
            parts.append(grads)
        grad_k, grad_v = (torch.cat(x, 1) for x in zip(*parts, strict=True))
        return total.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype), None, None, None


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("packed", (False, True))
@pytest.mark.parametrize("bounds", ((0, 19), (0, 1, 2, 11, 19), (0, 7, 14, 19)))
def test_merged_stretches_equal_the_whole(
    block: None, window: int | None, packed: bool, bounds: tuple[int, ...]
) -> None:
    qkv, ids = make(19, 19), documents(19) if packed else None
    expected, expected_grads = gradients(
        lambda *x: [attention(*x, window=window, scale=0.4, segment_ids=ids, backend="reference")],
        qkv,
    )
    actual, grads = gradients(lambda *x: [Stretches.apply(*x, window, ids, bounds)], qkv)
    torch.testing.assert_close(actual + grads, expected + expected_grads, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "dtype,limit", [(torch.float32, 1e-6), (torch.bfloat16, 5e-3)], ids=("float32", "bfloat16")
)
@pytest.mark.parametrize("window,packed", [(None, False), (100, True)])
def test_low_precision(dtype: torch.dtype, limit: float, window: int | None, packed: bool) -> None:
    qkv = make(300, 300, dim=64, dtype=dtype)
    ids = torch.arange(300).div(90, rounding_mode="floor").expand(2, 300) if packed else None
    expected, expected_grads = gradients(
        lambda *x: [attention(*x, window=window, scale=0.4, segment_ids=ids, backend="reference")],
        [x.double() for x in qkv],
    )
    actual, grads = gradients(
        lambda *x: [Stretches.apply(*x, window, ids, (0, 100, 200, 300))], qkv
    )
    assert {x.dtype for x in actual + grads} == {dtype}
    for name, a, e in zip("oqkv", actual + grads, expected + expected_grads, strict=True):
        assert_ratio(name, a, e, limit)


def test_extreme_scores_stay_finite() -> None:
    q, k, v = make(9, 9, dtype=torch.float32)
    place = {"scale": 1e8, "query_start": 3, "key_start": 4, "window": 4}
    place |= {"segment_ids": None, "key_segment_ids": None}
    o, lse = partial_attention(q, k, v, **place)
    grads = partial_attention_backward(o, q, k, v, lse, (o * o).sum(-1), **place)
    assert all(x.isfinite().all() for x in (o, *grads))
    o, lse = merge_partial(o, lse, o, lse)
    assert o.isfinite().all()
    assert torch.equal(lse[:, 0], torch.full_like(lse[:, 0], float("-inf")))
