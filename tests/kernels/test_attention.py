"""attention: blocks against the written-out softmax; windows, groups, documents, cache."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rondo.kernels.softmax_attention import attend_prefix, attention, chunked, flash
from rondo.tests.numerics import assert_ratio, gradients

WINDOWS = (None, 1, 3, 11, 40)


@pytest.fixture(params=[(128, 512), (4, 512), (4, 0)], ids=["usual", "blocks", "recompute"])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The usual block; small blocks that keep their weights; small blocks that do not."""
    monkeypatch.setattr(chunked, "BLOCK", request.param[0])
    monkeypatch.setattr(chunked, "KEPT_KEYS", request.param[1])


def make(
    time: int,
    keys: int | None = None,
    *,
    batch: int = 2,
    heads: int = 4,
    groups: int = 2,
    dim: int = 8,
    values: int = 6,
    seed: int = 1,
) -> list[Tensor]:
    """q, k, v in float64."""
    generator = torch.Generator().manual_seed(seed)
    keys = keys or time
    shapes = (batch, time, heads, dim), (batch, keys, groups, dim), (batch, keys, groups, values)
    return [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]


def documents(keys: int, batch: int = 2, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(batch, keys, generator=generator) < 0.2).cumsum(1) * 3


def run(backend: str, window: int | None = None, ids: Tensor | None = None, time: int = 0):
    """`ids` are those of the keys; the queries are the last `time`."""
    segments = {} if ids is None else {"segment_ids": ids[:, -time:], "key_segment_ids": ids}
    return lambda *qkv: [attention(*qkv, window=window, backend=backend, **segments)]


def with_lse(backend: str, window: int | None = None, ids: Tensor | None = None, time: int = 0):
    """As `run`, the log-sum-exp too."""
    segments = {} if ids is None else {"segment_ids": ids[:, -time:], "key_segment_ids": ids}
    options = {"window": window, "backend": backend, "return_lse": True}
    return lambda *qkv: list(attention(*qkv, **options, **segments))


def naive(q: Tensor, k: Tensor, v: Tensor, window: int | None, ids: Tensor | None = None) -> Tensor:
    """One query at a time, from the definition."""
    (batch, time, heads, dim), keys, per_group = q.shape, k.shape[1], q.shape[2] // k.shape[2]
    out = torch.zeros(batch, time, heads, v.shape[-1], dtype=q.dtype)
    for b, i, h in itertools.product(range(batch), range(time), range(heads)):
        at, group = keys - time + i, h // per_group
        seen = [
            j
            for j in range(at + 1)
            if (window is None or j > at - window) and (ids is None or ids[b, j] == ids[b, at])
        ]
        weights = (k[b, seen, group] @ q[b, i, h] * dim**-0.5).softmax(0)
        out[b, i, h] = weights @ v[b, seen, group]
    return out


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("keys", (11, 17))
@pytest.mark.parametrize("packed", (False, True))
@pytest.mark.parametrize("backend", ("reference", "chunked"))
def test_matches_definition(
    block: None, backend: str, window: int | None, keys: int, packed: bool
) -> None:
    qkv, ids = make(11, keys), documents(keys) if packed else None
    actual = run(backend, window, ids, 11)(*qkv)[0]
    torch.testing.assert_close(actual, naive(*qkv, window, ids))


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("shape", ((1, 1), (1, 9), (11, 11), (11, 17)))
@pytest.mark.parametrize("packed", (False, True))
@pytest.mark.parametrize("groups", (1, 2, 4))
def test_chunked_matches_reference(
    block: None, window: int | None, shape: tuple[int, int], packed: bool, groups: int
) -> None:
    qkv, ids = make(*shape, groups=groups), documents(shape[1]) if packed else None
    expected, expected_grads = gradients(run("reference", window, ids, shape[0]), qkv)
    actual, actual_grads = gradients(run("chunked", window, ids, shape[0]), qkv)
    torch.testing.assert_close(actual + actual_grads, expected + expected_grads)


@pytest.mark.parametrize("window", (None, 3))
@pytest.mark.parametrize("shape", ((1, 9), (11, 17)))
@pytest.mark.parametrize("packed", (False, True))
def test_log_sum_exp(block: None, window: int | None, shape: tuple[int, int], packed: bool) -> None:
    """Of the reference by softmax weights; of the blocks by the reference, gradients too."""
    qkv, ids = make(*shape), documents(shape[1]) if packed else None
    expected, expected_grads = gradients(with_lse("reference", window, ids, shape[0]), qkv)
    actual, actual_grads = gradients(with_lse("chunked", window, ids, shape[0]), qkv)
    torch.testing.assert_close(actual + actual_grads, expected + expected_grads)
    torch.testing.assert_close(actual[0], run("chunked", window, ids, shape[0])(*qkv)[0])
    # Another key with the score s takes exp(s) / (exp(s) + exp(lse)) of the weight.
    q, k, v = qkv
    extra = torch.zeros(2, 1, 2, 8, dtype=q.dtype)
    ones = torch.cat([torch.ones_like(extra[..., :1]), torch.zeros_like(v[..., :1])], 1)
    if window is None and not packed:
        share = attention(q, torch.cat([extra, k], 1), ones, backend="reference")
        torch.testing.assert_close(share.squeeze(-1), 1 / (1 + expected[1].exp()))


def test_prefix_equals_keys_in_front(block: None) -> None:
    """Keys that all queries see, joined by log-sum-exp, equal the same keys in one softmax."""
    q, k, v = make(11)
    before = make(1, 3, seed=2)[1:]
    before = [x[0] for x in before]

    def joined(q, k, v, k_before, v_before):
        return list(attend_prefix(q, k_before, v_before, *with_lse("chunked")(q, k, v)))

    def whole(q, k, v, k_before, v_before):
        k = torch.cat([k_before.expand(2, -1, -1, -1), k], 1)
        v = torch.cat([v_before.expand(2, -1, -1, -1), v], 1)
        return with_lse("reference")(q, k, v)

    expected, expected_grads = gradients(whole, [q, k, v, *before])
    actual, actual_grads = gradients(joined, [q, k, v, *before])
    torch.testing.assert_close(actual + actual_grads, expected + expected_grads)


@pytest.mark.parametrize("dtype,limit", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_log_sum_exp_in_low_precision(dtype: torch.dtype, limit: float) -> None:
    qkv = [x.to(dtype) for x in make(300, 333, dim=64, values=64)]
    expected, expected_grads = gradients(with_lse("reference", 100), [x.double() for x in qkv])
    actual, actual_grads = gradients(with_lse("chunked", 100), qkv)
    assert actual[1].dtype == torch.float32
    for name, a, e in zip("olqkv", actual + actual_grads, expected + expected_grads, strict=True):
        assert_ratio(name, a, e, limit)


@pytest.mark.parametrize("window,packed", [(None, False), (3, False), (4, True)])
def test_gradcheck(block: None, window: int | None, packed: bool) -> None:
    qkv = [x.requires_grad_() for x in make(6, 8, heads=2, groups=1, dim=3, values=2)]
    ids = documents(8) if packed else None
    torch.autograd.gradcheck(run("chunked", window, ids, 6), qkv)
    torch.autograd.gradcheck(with_lse("chunked", window, ids, 6), qkv)


@pytest.mark.parametrize(
    "dtype,limits", [(torch.float32, (1e-5, 1e-5)), (torch.bfloat16, (5e-3, 8e-3))]
)
@pytest.mark.parametrize("window,packed", [(None, False), (100, True)])
def test_low_precision(
    dtype: torch.dtype, limits: tuple[float, float], window: int | None, packed: bool
) -> None:
    qkv = [x.to(dtype) for x in make(300, 333, dim=64, values=64)]
    ids = torch.arange(333).div(90, rounding_mode="floor").expand(2, 333) if packed else None
    expected, expected_grads = gradients(
        run("reference", window, ids, 300), [x.double() for x in qkv]
    )
    actual, actual_grads = gradients(run("chunked", window, ids, 300), qkv)
    assert {y.dtype for y in actual + actual_grads} == {dtype}
    assert_ratio("o", actual[0], expected[0], limits[0])
    for name, a, e in zip("qkv", actual_grads, expected_grads, strict=True):
        assert_ratio(f"d{name}", a, e, limits[1])


@pytest.mark.parametrize("backend", ("reference", "chunked"))
def test_matches_torch(backend: str) -> None:
    q, k, v = make(140, groups=4)
    expected = F.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), is_causal=True
    ).transpose(1, 2)
    torch.testing.assert_close(run(backend)(q, k, v)[0], expected)


@pytest.mark.parametrize("window", (None, 5))
@pytest.mark.parametrize("split", (1, 6, 12))
def test_cache_equals_whole(block: None, split: int, window: int | None) -> None:
    q, k, v = make(13)
    ids = documents(13)
    whole = run("chunked", window, ids, 13)(q, k, v)[0]
    first = run("chunked", window, ids[:, :split], split)(q[:, :split], k[:, :split], v[:, :split])
    second = run("chunked", window, ids, 13 - split)(q[:, split:], k, v)
    torch.testing.assert_close(torch.cat((first[0], second[0]), 1), whole)


def test_packed_equals_separate(block: None) -> None:
    q, k, v = make(14)
    bounds = (0, 5, 6, 14)
    ids = torch.cat([torch.full((2, b - a), a) for a, b in itertools.pairwise(bounds)], 1)
    packed = run("chunked", 3, ids, 14)(q, k, v)[0]
    pieces = [
        run("chunked", 3)(q[:, a:b], k[:, a:b], v[:, a:b])[0] for a, b in itertools.pairwise(bounds)
    ]
    torch.testing.assert_close(packed, torch.cat(pieces, 1))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_other_documents_change_nothing(dtype: torch.dtype) -> None:
    q, k, v = (x.to(dtype) for x in make(200))
    ids = (torch.arange(200) >= 150).long().expand(2, 200)
    before = run("chunked", None, ids, 200)(q, k, v)[0]
    for x in (q, k, v):
        x[:, :150] += 3
    after = run("chunked", None, ids, 200)(q, k, v)[0]
    assert not torch.equal(before[:, :150], after[:, :150])
    assert torch.equal(before[:, 150:], after[:, 150:])


def test_causal(block: None) -> None:
    qkv = [x.requires_grad_() for x in make(12)]
    out = run("chunked")(*qkv)[0]
    for grad in torch.autograd.grad(out[:, 7].sum(), qkv):
        assert torch.equal(grad[:, 8:], torch.zeros_like(grad[:, 8:]))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("backend", ("reference", "chunked"))
def test_large_scores_stay_finite(backend: str, dtype: torch.dtype) -> None:
    q, k, v = make(150)
    inputs = [(q * 1e4).to(dtype), (k * 1e4).to(dtype), v.to(dtype)]
    outputs, grads = gradients(run(backend, 9), inputs)
    assert all(y.isfinite().all() for y in outputs + grads)


def test_window_bounds_memory() -> None:
    """No tensor on the way grows with the square of the length."""
    largest = 0

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(
            self, function: Callable, types: object, args: tuple = (), kwargs: dict | None = None
        ) -> object:
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                largest = max(largest, out.untyped_storage().nbytes())
            return out

    qkv = [x.float().requires_grad_() for x in make(2048, batch=1, heads=2, groups=1)]
    with Sizes():
        run("chunked", 64)(*qkv)[0].sum().backward()
    assert 0 < largest < 2 * 2048 * 2048 // 4


@pytest.mark.parametrize("window,packed", [(None, False), (5, True)])
def test_traces_without_graph_breaks(window: int | None, packed: bool) -> None:
    torch.compiler.reset()
    qkv = [x.requires_grad_() for x in make(150)]
    function = run("chunked", window, documents(150) if packed else None, 150)
    expected = function(*qkv)[0]
    actual = torch.compile(function, fullgraph=True, backend="aot_eager")(*qkv)[0]
    grads = [torch.autograd.grad(y.square().sum(), qkv) for y in (actual, expected)]
    torch.testing.assert_close((actual, *grads[0]), (expected, *grads[1]))


def test_flash_document_bounds() -> None:
    """Cumulative lengths of queries and keys, with documents that lie wholly in the cache."""
    keys = torch.tensor([[0, 0, 1, 1, 1, 2], [0, 0, 0, 0, 4, 4]])
    query_bounds, key_bounds = flash._bounds(keys[:, 3:], keys)
    assert key_bounds.tolist() == [0, 2, 5, 6, 10, 12]
    assert query_bounds.tolist() == [0, 0, 2, 3, 4, 6]
    assert query_bounds.dtype == key_bounds.dtype == torch.int32


def arguments(**change: object) -> dict[str, object]:
    q, k, v = make(6, 8)
    return {"q": q, "k": k, "v": v} | change


@pytest.mark.parametrize(
    "change,message",
    [
        ({"q": torch.zeros(2, 6, 4)}, r"q must be \(B, T, H, D\), got \(2, 6, 4\)"),
        ({"q": torch.zeros(2, 6, 4, 7)}, r"k \(2, 8, 2, 8\) must share.*q \(2, 6, 4, 7\)"),
        ({"v": torch.zeros(2, 7, 2, 8)}, r"v \(2, 7, 2, 8\) must share"),
        ({"q": torch.zeros(2, 6, 3, 8)}, "3 query heads do not divide by 2 key heads"),
        ({"q": torch.zeros(2, 9, 4, 8)}, "8 keys are fewer than 9 queries"),
        ({"window": 0}, "window must be at least 1 or None, got 0"),
        ({"segment_ids": torch.zeros(2, 8)}, r"segment_ids must be \(2, 6\), got \(2, 8\)"),
        ({"segment_ids": torch.zeros(2, 6)}, r"key_segment_ids \(2, 8\) is required"),
        ({"key_segment_ids": torch.zeros(2, 8)}, "key_segment_ids needs segment_ids"),
        (
            {"segment_ids": torch.zeros(2, 6), "key_segment_ids": torch.zeros(2, 7)},
            r"key_segment_ids must be \(2, 8\), got \(2, 7\)",
        ),
        ({"backend": "triton"}, "'triton' cannot run: it has no Triton kernel: 'chunked'"),
        ({"backend": "flash", "return_lse": True}, "'flash' is not available"),
        ({"backend": "flash"}, "'flash' cannot run: it needs CUDA tensors, got cpu"),
    ],
)
def test_invalid_inputs(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attention(**arguments(**change))


@pytest.mark.parametrize("window", [None, 1, 7])
@pytest.mark.parametrize("packed", [False, True])
def test_the_masked_form_for_gpus_equals_the_reference(window: int | None, packed: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, 21, heads, 8, generator=generator, dtype=torch.float64)
        for heads in (4, 2, 2)
    )
    ids = torch.zeros(2, 21, dtype=torch.long)
    ids[:, 9:] = 1
    ids = ids if packed else None
    expected = attention(q, k, v, window=window, scale=0.3, segment_ids=ids, backend="reference")
    actual = chunked.masked_sdpa(q, k, v, window, 0.3, ids, ids)
    torch.testing.assert_close(actual, expected)
