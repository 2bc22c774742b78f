"""The linear scan: the reference against products written out, the chunked form against it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import deterministic

from rondo.kernels.scan import chunked, linear_scan, linear_scan_stretch, linear_scan_summary
from rondo.kernels.summary import combine
from rondo.tests.numerics import assert_ratio, gradients

LIMITS = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-2}
SHAPES = ((), (5,), (2, 3))


def make(
    time: int, shape: tuple[int, ...] = (5,), dtype: torch.dtype = torch.float64, seed: int = 0
) -> list[Tensor]:
    """a in [-1, 1] with exact zeros and ones of both signs, b and an initial state."""
    generator = torch.Generator().manual_seed(seed)
    draw = functools.partial(torch.rand, generator=generator, dtype=torch.float64)
    a = 2 * draw(2, time, *shape) - 1
    for value in (0.0, 1.0, -1.0):
        a[draw(a.shape) < 0.1] = value
    b, state = 2 * draw(2, time, *shape) - 1, 2 * draw(2, *shape) - 1
    return [a.to(dtype), b.to(dtype), state.to(torch.promote_types(dtype, torch.float32))]


def documents(time: int, chance: float = 0.1, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(2, time, generator=generator) < chance).cumsum(1)


def run(
    a: Tensor, b: Tensor, state: Tensor | None = None, ids: Tensor | None = None, **options: str
) -> tuple[Tensor, Tensor]:
    return linear_scan(a, b, initial_state=state, segment_ids=ids, **options)


def check(inputs: list[Tensor], ids: Tensor | None) -> None:
    """Outputs and gradients of the chunked form against the float64 reference."""
    actual = gradients(functools.partial(run, ids=ids, backend="chunked"), inputs)
    exact = [x.double() for x in inputs]
    expected = gradients(functools.partial(run, ids=ids, backend="reference"), exact)
    names = ("h", "last", "da", "db", "dstate")
    pairs = zip(actual[0] + actual[1], expected[0] + expected[1], strict=True)
    for name, (x, y) in zip(names, pairs, strict=False):
        assert_ratio(name, x, y, LIMITS[inputs[0].dtype])


def in_two(
    a: Tensor, b: Tensor, state: Tensor, ids: Tensor | None = None, cut: int = 1, **options: str
) -> tuple[Tensor, Tensor]:
    """As two ranks do: both stretches are begun before any state is known."""
    parts = []
    for here in (slice(None, cut), slice(cut, None)):
        own = None if ids is None else ids[:, here]
        parts.append(linear_scan_stretch(a[:, here], b[:, here], segment_ids=own, **options))
    outputs = []
    for i, part in enumerate(parts):
        if i and ids is not None:
            same = ids[:, cut - 1] == ids[:, cut]
            state = torch.where(same.view(-1, *(1,) * (state.dim() - 1)), state, 0.0)
        h, state = part.finish(state)
        outputs.append(h)
    return torch.cat(outputs, 1), state


def assert_equal(actual: Tensor, expected: Tensor, atol: float = 1e-10) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


@pytest.fixture(params=("narrow", "wide"))
def width(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to run a scan, whatever its size."""
    monkeypatch.setattr(chunked, "WIDE", 1 if request.param == "wide" else 10**9)
    return request.param


def test_reference_is_a_sum_of_products() -> None:
    a, b, state = make(12)
    ids = documents(12, 0.3)
    h, last = run(a, b, state, ids, backend="reference")
    for t in range(12):
        expected = torch.zeros_like(state)
        for j in range(-1, t + 1):
            term = state if j < 0 else b[:, j]
            same = ids[:, max(j, 0)] == ids[:, t]
            expected += same.unsqueeze(-1) * a[:, j + 1 : t + 1].prod(1) * term
        assert_equal(h[:, t], expected)
    assert_equal(last, h[:, -1])


@pytest.mark.parametrize("time", (1, 2, 3, 15, 16, 17, 63, 64, 65, 130))
@pytest.mark.parametrize("dtype", LIMITS)
def test_chunked_equals_reference(time: int, dtype: torch.dtype, width: str) -> None:
    for index, shape in enumerate(SHAPES):
        inputs = make(time, shape, dtype)
        check(inputs[: 3 - index % 2], documents(time) if index else None)


def test_dtypes() -> None:
    for dtype, wide in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        for backend in ("chunked", "reference"):
            h, last = run(*make(9, dtype=dtype), backend=backend)
            if (h.dtype, last.dtype) != (dtype, wide):
                raise AssertionError(f"{backend}: h is {h.dtype}, last is {last.dtype}")


def test_gradcheck(width: str) -> None:
    inputs = [x.requires_grad_() for x in make(11, (2,))]
    for ids in (None, documents(11, 0.2)):
        torch.autograd.gradcheck(functools.partial(run, ids=ids, backend="chunked"), inputs)


def test_gradient_of_one_output_alone() -> None:
    for index in (0, 1):
        grads = []
        for backend in ("chunked", "reference"):
            inputs = [x.requires_grad_() for x in make(20)]
            out = run(*inputs, documents(20), backend=backend)[index]
            grads.append(torch.autograd.grad(out.sum(), inputs))
        for x, y in zip(*grads, strict=True):
            assert_equal(x, y)


@pytest.mark.parametrize("backend", ("chunked", "reference"))
def test_packed_documents_equal_separate_calls(backend: str, width: str) -> None:
    lengths = (20, 1, 30, 1, 1, 9)
    inputs = make(sum(lengths))
    ids = torch.repeat_interleave(torch.tensor([3, 4, 7, 8, 9, 20]), torch.tensor(lengths))

    def separate(a: Tensor, b: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        outputs = []
        for part_a, part_b in zip(a.split(lengths, 1), b.split(lengths, 1), strict=True):
            h, last = run(part_a, part_b, state, backend=backend)
            outputs.append(h)
            state = torch.zeros_like(state)
        return torch.cat(outputs, dim=1), last

    whole = functools.partial(run, ids=ids.expand(2, -1), backend=backend)
    results = [gradients(f, inputs) for f in (whole, separate)]
    for x, y in zip(*(o + g for o, g in results), strict=True):
        assert_equal(x, y)


def test_documents_do_not_leak(width: str) -> None:
    a, b, state = make(60, dtype=torch.float32)
    ids = (torch.arange(60) >= 37).long().expand(2, -1)
    function = functools.partial(run, ids=ids, backend="chunked")
    (h, last), grads = gradients(function, [a, b, state])
    other = [torch.cat([x[:, :37] * 0.5 + 0.1, x[:, 37:]], dim=1) for x in (a, b)]
    (h2, last2), grads2 = gradients(function, [*other, state * 5])
    assert_equal(last2, last, 0)
    for x, y in zip((h2, *grads2[:2]), (h, *grads[:2]), strict=True):
        assert_equal(x[:, 37:], y[:, 37:], 0)
    if torch.equal(h2[:, :37], h[:, :37]):
        raise AssertionError("the first document did not notice its own change")


def test_split_with_carried_state_equals_whole(width: str) -> None:
    a, b, state = make(90)
    ids = documents(90, 0.04)
    h, last = run(a, b, state, ids)
    for cut in (1, 9, 41, 89):
        h1, middle = run(a[:, :cut], b[:, :cut], state, ids[:, :cut])
        middle = middle * (ids[:, cut - 1] == ids[:, cut]).unsqueeze(-1)
        h2, end = run(a[:, cut:], b[:, cut:], middle, ids[:, cut:])
        assert_equal(torch.cat([h1, h2], dim=1), h)
        assert_equal(end, last)


def test_causality(width: str) -> None:
    a, b, state = (x.requires_grad_() for x in make(50, dtype=torch.float32))
    h, _ = run(a, b, state)
    for t in (0, 6, 7, 37):
        for grad in torch.autograd.grad(h[:, t].sum(), (a, b), retain_graph=True):
            if grad[:, t + 1 :].count_nonzero():
                raise AssertionError(f"h[{t}] depends on later inputs")


def test_summaries_compose() -> None:
    a, b, state = make(75)
    a = a.where(a != 0, 0.5)  # a zero would hide everything before it
    for ids in (None, documents(75, 0.03)):
        whole = linear_scan_summary(a, b, segment_ids=ids)
        assert_equal(whole.apply(state), run(a, b, state, ids, backend="reference")[1])
    whole = linear_scan_summary(a, b)
    if not whole.transition.count_nonzero():
        raise AssertionError("every transition vanished: nothing was compared")
    for cut in (1, 16, 40, 74):
        both = combine(
            linear_scan_summary(a[:, :cut], b[:, :cut]), linear_scan_summary(a[:, cut:], b[:, cut:])
        )
        for x, y in zip(both, whole, strict=True):
            assert_equal(x, y)
    first, second, third = (
        linear_scan_summary(a[:, part], b[:, part])
        for part in (slice(20), slice(20, 55), slice(55, None))
    )
    left = combine(combine(first, second), third)
    for x, y in zip(left, combine(first, combine(second, third)), strict=True):
        assert_equal(x, y)


def test_summary_gradients() -> None:
    inputs, ids = make(30), documents(30, 0.03)

    def through_summary(a: Tensor, b: Tensor, state: Tensor) -> list[Tensor]:
        return [linear_scan_summary(a, b, segment_ids=ids).apply(state)]

    results = [
        gradients(f, inputs)
        for f in (through_summary, lambda *x: [run(*x, ids, backend="reference")[1]])
    ]
    for x, y in zip(*(o + g for o, g in results), strict=True):
        assert_equal(x, y)


@pytest.mark.quick
@pytest.mark.parametrize(("time", "cut"), [(2, 1), (7, 3), (40, 20), (67, 64)])
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_two_stretches_are_one_row(dtype: torch.dtype, time: int, cut: int) -> None:
    """Every gradient too, with documents that span the cut, end at it, and begin inside."""
    for index, shape in enumerate(SHAPES):
        inputs = make(time, shape, dtype)
        ids = documents(time) if index else None
        actual = gradients(functools.partial(in_two, ids=ids, cut=cut), inputs)
        exact = [x.double() for x in inputs]
        expected = gradients(functools.partial(run, ids=ids, backend="reference"), exact)
        assert [x.dtype for x in actual[0]] == [inputs[1].dtype, inputs[2].dtype]
        for x, y in zip(actual[0] + actual[1], expected[0] + expected[1], strict=True):
            assert_ratio("stretches", x, y, LIMITS[dtype])


def test_a_stretch_may_be_asked_for_its_last_state_alone() -> None:
    inputs = make(20)[:2]
    results = [
        gradients(f, inputs)
        for f in (
            lambda *x: [linear_scan_stretch(*x).summary.state],
            lambda *x: [run(*x, backend="reference")[1]],
        )
    ]
    for x, y in zip(*(o + g for o, g in results), strict=True):
        assert_equal(x, y)


def test_a_stretch_scans_once_in_each_direction(monkeypatch: pytest.MonkeyPatch) -> None:
    """A position is stepped over as often as in a whole row; borders between chunks are few."""
    steps, counted = chunked._steps, []

    def count(states: Any, *arguments: Any, **options: Any) -> None:
        counted.append(sum(x.numel() for x in states))
        steps(states, *arguments, **options)

    monkeypatch.setattr(chunked, "_steps", count)
    inputs = make(144)
    gradients(lambda a, b, s: linear_scan_stretch(a, b).finish(s), inputs)
    positions, borders = 144 * 2 * 5, 12 * 2 * 5
    assert counted == [positions, borders] * 2
    counted.clear()
    gradients(run, inputs)
    assert counted == [positions] * 2


def test_the_reference_has_no_stretch() -> None:
    assert linear_scan_stretch(*make(3)[:2], backend="reference") is None


def test_unwritten_memory_is_never_read(width: str) -> None:
    inputs, ids = make(70), documents(70)
    functions = [functools.partial(f, ids=ids) for f in (run, in_two)]
    plain = [gradients(f, inputs) for f in functions]
    torch.use_deterministic_algorithms(True)
    try:
        if not deterministic.fill_uninitialized_memory:
            raise AssertionError("torch.empty is not filled with NaN")
        poisoned = [gradients(f, inputs) for f in functions]
    finally:
        torch.use_deterministic_algorithms(False)
    for before, after in zip(plain, poisoned, strict=True):
        for x, y in zip(before[0] + before[1], after[0] + after[1], strict=True):
            assert_equal(x, y, 0)


@pytest.mark.parametrize("form", (run, in_two))
def test_traces_without_graph_breaks(form: Callable[..., tuple[Tensor, Tensor]]) -> None:
    inputs, function = make(20), functools.partial(form, ids=documents(20))
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    results = [gradients(f, inputs) for f in (compiled, function)]
    for x, y in zip(*(o + g for o, g in results), strict=True):
        assert_equal(x, y)


def test_wrong_inputs() -> None:
    a, b, state = make(20)
    ids = documents(20)
    for arguments, message in (
        ((a[:, :19], b), r"a has shape \(2, 19, 5\), b has \(2, 20, 5\)"),
        ((a[:, 0, 0], b), r"a has shape \(2,\)"),
        ((a[:, :0], b[:, :0]), "at least one position"),
        ((a, b.long()), "dtype torch.int64"),
        ((a, b, state[:, :4]), r"initial_state has shape \(2, 4\), expected .* \(2, 5\)"),
        ((a, b, state, ids[:, 1:]), r"segment_ids has shape \(2, 19\)"),
        ((a, b, state, ids.float()), "segment_ids has .* dtype torch.float32"),
    ):
        with pytest.raises(ValueError, match=message):
            run(*arguments)
    with pytest.raises(ValueError, match="backend 'flash' is not available"):
        run(a, b, backend="flash")
