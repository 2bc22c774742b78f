"""short_conv: chunked against the token-by-token reference, documents, carried state."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from rondo.kernels import conv, conv_library
from rondo.kernels.conv import short_conv
from rondo.tests.numerics import assert_ratio, gradients


def make(
    time: int, width: int = 4, *, batch: int = 2, channels: int = 6, seed: int = 0
) -> list[Tensor]:
    """x, weight, bias, initial_state in float64."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (batch, time, channels), (channels, width), (channels,), (batch, width - 1, channels)
    return [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]


def documents(time: int, batch: int = 2, seed: int = 0) -> Tensor:
    """Random non-decreasing ids with some documents shorter than a window."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(batch, time, generator=generator) < 0.3).cumsum(1) * 2


def run(backend: str, ids: Tensor | None = None, activation: str | None = "silu"):
    return lambda x, w, b, s: short_conv(
        x, w, b, activation=activation, initial_state=s, segment_ids=ids, backend=backend
    )


@pytest.fixture(params=[2**19, 12])
def tile(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """The usual tile, and one of a few tokens."""
    monkeypatch.setattr(conv, "TILE", request.param)
    monkeypatch.setattr(conv, "MIN_TILE_TIME", 2)
    return request.param


@pytest.mark.parametrize(
    "time,width,packed,activation",
    list(itertools.product((1, 2, 3, 17), (1, 2, 4), (False, True), (None, "silu"))),
)
def test_chunked_matches_reference(
    tile: int, time: int, width: int, packed: bool, activation: str | None
) -> None:
    inputs, ids = make(time, width), documents(time) if packed else None
    expected, expected_grads = gradients(run("reference", ids, activation), inputs)
    actual, actual_grads = gradients(run("chunked", ids, activation), inputs)
    names = ("y", "state", "dx", "dweight", "dbias", "dstate")
    for name, a, e in zip(names, actual + actual_grads, expected + expected_grads, strict=True):
        torch.testing.assert_close(a, e, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    "time,width,activation", list(itertools.product((1, 2, 3, 17), (1, 2, 4), (None, "silu")))
)
def test_library_matches_reference(time: int, width: int, activation: str | None) -> None:
    inputs = make(time, width)
    expected, expected_grads = gradients(run("reference", None, activation), inputs)
    actual, actual_grads = gradients(run("library", None, activation), inputs)
    torch.testing.assert_close(actual + actual_grads, expected + expected_grads)


@pytest.mark.parametrize("packed", (False, True))
def test_gradcheck(tile: int, packed: bool) -> None:
    inputs = [x.requires_grad_() for x in make(7, 3, channels=2)]
    torch.autograd.gradcheck(run("chunked", documents(7) if packed else None), inputs)


@pytest.mark.parametrize(
    "dtype,limits", [(torch.float32, (1e-5,) * 2), (torch.bfloat16, (5e-3, 8e-3))]
)
def test_low_precision(dtype: torch.dtype, limits: tuple[float, float]) -> None:
    inputs, ids = [x.to(dtype) for x in make(200, channels=32)], documents(200)
    expected, expected_grads = gradients(run("reference", ids), [x.double() for x in inputs])
    actual, actual_grads = gradients(run("chunked", ids), inputs)
    assert {y.dtype for y in actual + actual_grads} == {dtype}
    for a, e in zip(actual, expected, strict=True):
        assert_ratio("output", a, e, limits[0])
    for a, e in zip(actual_grads, expected_grads, strict=True):
        assert_ratio("gradient", a, e, limits[1])


@pytest.mark.skipif(
    not conv_library.library_serves(torch.zeros(1, 1, 1, dtype=torch.bfloat16), None),
    reason="this processor or build has no bfloat16 convolution",
)
def test_library_in_bfloat16() -> None:
    inputs = [x.bfloat16() for x in make(200, channels=32)]
    expected, expected_grads = gradients(run("reference"), [x.double() for x in inputs])
    actual, actual_grads = gradients(run("auto"), inputs)
    assert {y.dtype for y in actual + actual_grads} == {torch.bfloat16}
    assert_ratio("output", actual[0], expected[0], 5e-3)
    for a, e in zip(actual_grads, expected_grads, strict=True):
        assert_ratio("gradient", a, e, 8e-3)


def test_library_takes_no_documents() -> None:
    with pytest.raises(ValueError, match="library"):
        run("library", documents(9))(*make(9))


@pytest.mark.parametrize("backend", ("reference", "chunked"))
@pytest.mark.parametrize("split", (1, 2, 6, 10))
def test_carried_state_equals_whole(backend: str, split: int) -> None:
    x, weight, bias, state = make(12)
    ids = torch.tensor([[0] * 7 + [1] * 5, [0] * 12])
    whole, last = run(backend, ids)(x, weight, bias, state)
    first, middle = run(backend, ids[:, :split])(x[:, :split], weight, bias, state)
    second, end = run(backend, ids[:, split:])(
        x[:, split:], weight, bias, middle * (ids[:, split - 1] == ids[:, split])[:, None, None]
    )
    torch.testing.assert_close(torch.cat((first, second), 1), whole)
    torch.testing.assert_close(end, last)


@pytest.mark.parametrize("bounds", ((0, 5, 7, 14), (0, 12, 13, 14)))
@pytest.mark.parametrize("backend", ("reference", "chunked"))
def test_packed_equals_separate(backend: str, bounds: tuple[int, ...]) -> None:
    x, weight, bias, state = make(14, batch=1)
    ids = torch.cat(
        [torch.full((1, b - a), i) for i, (a, b) in enumerate(itertools.pairwise(bounds))], 1
    )
    packed, last = run(backend, ids)(x, weight, bias, state)
    pieces = [
        run(backend)(x[:, a:b], weight, bias, state if a == 0 else None)
        for a, b in itertools.pairwise(bounds)
    ]
    torch.testing.assert_close(packed, torch.cat([y for y, _ in pieces], 1))
    torch.testing.assert_close(last, pieces[-1][1])


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_other_documents_change_nothing(dtype: torch.dtype) -> None:
    x, weight, bias, state = (z.to(dtype) for z in make(20))
    ids = (torch.arange(20) >= 9).long().expand(2, 20)
    before, state_before = run("chunked", ids)(x, weight, bias, state)
    x[:, :9] += 100
    after, state_after = run("chunked", ids)(x, weight, bias, state + 100)
    assert not torch.equal(before[:, :9], after[:, :9])
    assert torch.equal(before[:, 9:], after[:, 9:])
    assert torch.equal(state_before, state_after)


def test_state_does_not_keep_the_sequence_alive() -> None:
    x, weight, _, _ = make(64)
    _, state = short_conv(x, weight)
    assert state.untyped_storage().nbytes() == state.nbytes


def test_traces_without_graph_breaks() -> None:
    inputs, ids = [x.requires_grad_() for x in make(9)], documents(9)
    expected = run("chunked", ids)(*inputs)
    compiled = torch.compile(run("chunked", ids), fullgraph=True, backend="aot_eager")
    actual = compiled(*inputs)
    wanted = torch.autograd.grad(expected[0].sum() + expected[1].sum(), inputs)
    got = torch.autograd.grad(actual[0].sum() + actual[1].sum(), inputs)
    torch.testing.assert_close((*actual, *got), (*expected, *wanted))


@pytest.mark.parametrize(
    "change,message",
    [
        ({"x": torch.zeros(2, 3)}, r"x must be \(B, T, C\), got \(2, 3\)"),
        ({"weight": torch.zeros(5, 4)}, r"weight must be \(6, W\).*got \(5, 4\)"),
        ({"bias": torch.zeros(5)}, r"bias must be \(6,\), got \(5,\)"),
        ({"activation": "relu"}, "activation must be None or 'silu', got 'relu'"),
        (
            {"initial_state": torch.zeros(2, 4, 6)},
            r"initial_state must be \(2, 3, 6\), got \(2, 4, 6\)",
        ),
        ({"segment_ids": torch.zeros(2, 8)}, r"segment_ids must be \(2, 9\), got \(2, 8\)"),
        ({"backend": "flash"}, "backend 'flash' is not available"),
    ],
)
def test_invalid_inputs(change: dict, message: str) -> None:
    arguments = {"x": torch.zeros(2, 9, 6), "weight": torch.zeros(6, 4)} | change
    with pytest.raises(ValueError, match=message):
        short_conv(
            arguments.pop("x"), arguments.pop("weight"), arguments.pop("bias", None), **arguments
        )
