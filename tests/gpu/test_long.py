"""On a CUDA device: long rows, many rows, and tensors of more than 2^31 numbers.

The end of a row is what its end alone gives, since decays forget the rest. The check itself is
tested on a CPU.
"""

from __future__ import annotations

import fcntl
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rondo.kernels import (
    attention,
    backend,
    combine_rows,
    gated_delta_rule,
    gated_linear_attention,
    gather_rows,
    l2_norm,
    linear_cross_entropy,
    linear_scan,
    newton_rnn,
    nonlinear_rnn,
    rms_norm,
    short_conv,
)
from rondo.kernels.expert_products import rows_times
from rondo.tests.numerics import assert_ratio, gradients

needs_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
LIMITS = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
READ, KEPT = 64, 512
"""Outputs that are compared, and the tokens, they among them, that they can depend on."""
Operator = Callable[..., Tensor]


class Draw:
    """Normal numbers on a device."""

    def __init__(self, device: str, dtype: torch.dtype) -> None:
        self.generator = torch.Generator(device).manual_seed(0)
        self.device, self.dtype = device, dtype

    def __call__(self, *shape: int) -> Tensor:
        like = {"device": self.device, "dtype": self.dtype}
        return torch.randn(shape, generator=self.generator, **like)


def heads(decay: str, delta: bool) -> Callable[..., list[Tensor]]:
    """Inputs of linear attention or the delta rule, with decays a head or a key."""

    def make(draw: Draw, time: int, count: int = 2, dim: int = 64) -> list[Tensor]:
        shape = (1, time, count)
        q, k, v = (draw(*shape, dim) for _ in range(3))
        beta = [draw(*shape).sigmoid()] if delta else []
        size = shape if decay == "head" else (*shape, dim)
        rates = torch.linspace(-1.5, -0.5, size[-1], device=q.device).repeat(*size[:-1], 1)
        return [q, l2_norm(k), v, *beta, rates]

    return make


def from_the_end(x: Tensor) -> Tensor:
    """The numbers of tokens `(T,)` of x `(1, T, D)`, counted from the last: a part that ends as
    the whole does has the same."""
    return torch.arange(x.shape[1], 0, -1, device=x.device)


def losses(hidden: Tensor, weight: Tensor) -> Tensor:
    """`(1, T)`."""
    return linear_cross_entropy(hidden, weight, from_the_end(hidden)[None] % len(weight))


def sorted_choices(numbers: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Two of `count` experts a token: the choice at each row, the rows of each token `(T, 2)`, and
    the row after each expert's last `(count,)`."""
    first = numbers % count
    second = (first + 1 + numbers // count % (count - 1)) % count
    choices = torch.stack([first, second], 1).flatten()
    order = choices.argsort(stable=True)
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order), device=order.device)
    ends = choices.bincount(minlength=count).cumsum(0)
    return order, places.view(-1, 2), ends.to(torch.int32)


def experts(x: Tensor, weight: Tensor) -> Tensor:
    """`(1, T, D)`: the sum of two experts a token, each a matrix of `weight` `(N, D, D)`."""
    order, places, ends = sorted_choices(from_the_end(x), len(weight))
    rows = rows_times(gather_rows(x[0], order, places), weight, ends)
    return combine_rows(rows, order, places)[None]


FUNCTIONS = {"linear_attention": gated_linear_attention, "delta_rule": gated_delta_rule}
HEADS: dict[str, tuple[Operator, Callable[..., list[Tensor]]]] = {
    f"{name}_{decay}": (lambda *x, f=function: f(*x)[0], heads(decay, name == "delta_rule"))
    for decay in ("head", "key")
    for name, function in FUNCTIONS.items()
}
OPERATORS: dict[str, tuple[Operator, Callable[..., list[Tensor]]]] = {
    "linear_scan": (
        lambda a, b: linear_scan(a, b)[0],
        lambda draw, time: [draw(1, time, 64).sigmoid() / 2, draw(1, time, 64)],
    ),
    "short_conv": (
        lambda x, weight: short_conv(x, weight)[0],
        lambda draw, time: [draw(1, time, 64), draw(64, 4)],
    ),
    "para_gru": (
        lambda gates, recurrent: newton_rnn("para_gru", gates, recurrent).h,
        lambda draw, time: [draw(1, time, 3, 64), draw(3, 64) / 8],
    ),
    "para_lstm": (
        lambda gates, recurrent: newton_rnn("para_lstm", gates, recurrent).h,
        lambda draw, time: [draw(1, time, 3, 64), draw(5, 64) / 8],
    ),
    "lstm": (
        lambda gates, recurrent: nonlinear_rnn("lstm", gates, recurrent)[0],
        lambda draw, time: [draw(1, time, 4, 2, 32), draw(4, 2, 32, 32) / 16],
    ),
    "cross_entropy": (losses, lambda draw, time: [draw(1, time, 64), draw(5003, 64) / 8]),
    "experts": (experts, lambda draw, time: [draw(1, time, 64), draw(16, 64, 64) / 8]),
    **HEADS,
}


def check_end(operator: Operator, inputs: list[Tensor], limit: float) -> None:
    """Outputs at the end, and gradients there, are those of the last tokens by themselves. What has
    one row has one of tokens; the rest are weights."""

    def ends(*arguments: Tensor) -> list[Tensor]:
        return [operator(*arguments)[:, -READ:]]

    def last(x: Tensor) -> Tensor:
        return x[:, -KEPT:] if len(x) == 1 else x

    expected, actual = gradients(ends, [last(x) for x in inputs]), gradients(ends, inputs)
    assert_ratio("outputs", actual[0][0], expected[0][0], limit)
    for got, want in zip(actual[1], expected[1], strict=True):
        assert_ratio("gradient", last(got), want, limit)


@pytest.mark.gpu
@needs_a_gpu
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("time", [65_537, 131_072])
@pytest.mark.parametrize("name", OPERATORS)
def test_long_rows(name: str, time: int, dtype: torch.dtype) -> None:
    operator, make = OPERATORS[name]
    check_end(operator, make(Draw("cuda", dtype), time), LIMITS[dtype])


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("name", OPERATORS)
def test_the_check_of_long_rows(name: str, dtype: torch.dtype) -> None:
    operator, make = OPERATORS[name]
    check_end(operator, make(Draw("cpu", dtype), 1090), LIMITS[dtype])


def test_a_doubtful_version_is_tested(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the fixture of `conftest.py`; elsewhere "auto" would take the chunked form."""
    monkeypatch.setattr(backend, "_logged", {})
    monkeypatch.setattr(backend, "_triton_version", lambda: "3.6.0")
    monkeypatch.setattr(backend, "is_hopper", lambda device: True)
    monkeypatch.setattr(backend, "_has_triton", lambda: True)
    forms = {"chunked": len, "triton": sum}
    assert backend.choose_recurrence("op", "auto", forms, torch.device("cuda"), None) is sum


def test_the_check_sees_a_lost_token() -> None:
    operator, make = OPERATORS["linear_scan"]
    a, b = make(Draw("cpu", torch.float32), 1090)
    a = torch.full_like(a, 0.97)  # of what is before the last 512, a millionth is left
    check_end(operator, [a, b], 1e-4)

    def broken(a: Tensor, b: Tensor) -> Tensor:
        kept = torch.ones(b.shape[1], 1)
        kept[1000:1001] = 0  # too far back for the end alone
        return operator(a, b * kept)

    with pytest.raises(AssertionError, match="outputs: error ratio"):
        check_end(broken, [a, b], 1e-4)


@pytest.mark.gpu
@needs_a_gpu
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("time", [65_537, 131_072])
def test_attention_over_long_rows(time: int, dtype: torch.dtype) -> None:
    check_attention(Draw("cuda", dtype), time)


def check_attention(draw: Draw, time: int) -> None:
    """The last queries see what they see by themselves with all keys in front."""
    qkv = [draw(1, time, 2, 64) for _ in range(3)]

    def ends(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
        return [attention(q, k, v)[:, -READ:]]

    def alone(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
        return [attention(q[:, -READ:], k, v, backend="reference")]

    expected, actual = gradients(alone, [x.float() for x in qkv]), gradients(ends, qkv)
    limit = max(1e-3, LIMITS[draw.dtype])  # products of float32 are sums of less exact ones
    for got, want in zip([*actual[0], *actual[1]], [*expected[0], *expected[1]], strict=True):
        assert_ratio("attention", got, want, limit)


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_the_check_of_attention(dtype: torch.dtype) -> None:
    check_attention(Draw("cpu", dtype), 300)


@pytest.mark.gpu
@needs_a_gpu
@pytest.mark.parametrize("name", HEADS)
def test_more_heads_than_a_grid_has_rows(name: str) -> None:
    """Of all rows together more than 65,535: the last ones are what they are alone."""
    function = FUNCTIONS[name.rpartition("_")[0]]
    few = OPERATORS[name][1](Draw("cuda", torch.float32), 20, 4, 32)
    many, last = function(*(x.repeat(16_400, *[1] * (x.ndim - 1)) for x in few))
    assert many.shape[0] * many.shape[2] > 65_535
    alone, state = function(*few)
    assert_ratio("outputs", many[-3:], alone.expand_as(many[-3:]), 1e-5)
    assert_ratio("states", last[-3:], state.expand_as(last[-3:]), 1e-5)


@contextmanager
def room(gib: int) -> Iterator[None]:
    """For one test of several processes at a time; skips it where so much memory is not free."""
    with (Path(tempfile.gettempdir()) / "rondo-tests-large").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until it is closed
        free, _ = torch.cuda.mem_get_info()
        if free < gib * 2**30:
            pytest.skip(f"needs {gib} GiB of memory; {free / 2**30:.0f} GiB are free")
        yield
        torch.cuda.empty_cache()


@pytest.mark.gpu
@needs_a_gpu
@pytest.mark.parametrize("name", HEADS)
def test_states_of_more_than_two_billion_numbers(name: str) -> None:
    """Offsets that 32 bits do not hold, into the states of all chunks of a row."""
    operator, make = OPERATORS[name]
    time, count, dim = 131_072, 17, 256
    assert time // 64 * count * dim**2 > 2**31
    with room(64):
        draw = Draw("cuda", torch.bfloat16)
        check_end(operator, make(draw, time, count, dim), LIMITS[torch.bfloat16])


@pytest.mark.gpu
@needs_a_gpu
def test_more_than_two_billion_elements() -> None:
    x = torch.zeros(2**31 // 4096 + 8, 4096, device="cuda", dtype=torch.bfloat16)
    x[-1] = torch.arange(4096, device="cuda")
    with torch.no_grad():
        y = rms_norm(x)
        conv, _ = short_conv(x[None], torch.ones(4096, 2, device="cuda", dtype=x.dtype))
    assert_ratio("norm", y[-1:], rms_norm(x[-1:], backend="reference"), 1e-2)
    assert torch.equal(conv[0, -1], x[-1])


@pytest.mark.gpu
@needs_a_gpu
def test_rows_of_experts_of_more_than_two_billion_numbers() -> None:
    with room(16), torch.no_grad():
        x = torch.zeros(2**20 + 8, 1024, device="cuda", dtype=torch.bfloat16)
        x[-1] = torch.arange(1024, device="cuda")
        order, places, _ = sorted_choices(from_the_end(x[None]), 16)
        rows = gather_rows(x, order, places)
        assert rows.numel() > 2**31
        assert torch.equal(rows[places[-1]], x[-1].expand(2, -1))
        assert torch.equal(combine_rows(rows, order, places)[-1], 2 * x[-1])
