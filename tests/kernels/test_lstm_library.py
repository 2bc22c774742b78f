"""LSTM heads by torch's own layer against the loop, and where they are left to it."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from rondo.kernels import nonlinear_rnn
from rondo.kernels.nonlinear_rnn import lstm_library
from rondo.kernels.nonlinear_rnn.lstm_library import lstm, served
from rondo.models import MIXERS, ModelConfig
from rondo.models.mixer import SequenceContext
from rondo.models.mixers.rnn import RNNOptions
from rondo.tests.numerics import assert_ratio, gradients

pytestmark = [
    pytest.mark.quick,
    pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN"),
]
BATCH, TIME, HEADS, INPUTS, DIM = 3, 70, 2, 5, 6
LONG = torch.tensor([[0] * 70, [0] * 30 + [1] * 40, [0] * 30 + [1] * 20 + [2] * 20])


def operands(
    batch: int = BATCH, time: int = TIME, heads: int = HEADS, inputs: int = INPUTS, dim: int = DIM
) -> list[Tensor]:
    """x, weight, recurrent, bias, state."""
    generator = torch.Generator().manual_seed(0)
    shapes = (
        (batch, time, heads, inputs),
        (heads, 4, dim, inputs),
        (heads, 4, dim, dim),
        (heads, 4, dim),
        (batch, 2, heads, dim),
    )
    return [0.5 * torch.randn(*shape, generator=generator) for shape in shapes]


@pytest.mark.parametrize("ids", [None, LONG], ids=["one", "documents"])
@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_it_equals_the_loop(
    ids: Tensor | None, fresh: bool, dtype: torch.dtype, limit: float
) -> None:
    """Outputs, state and every gradient, with documents and carried state."""
    x = operands()[0].to(dtype)
    assert served(x, ids)
    compare(operands(), ids, fresh, dtype, limit)


@pytest.mark.parametrize(
    ("batch", "time", "dim", "heads"),
    [
        (1, 1024, 16, 1),
        (2, 64, 16, 12),
        (8, 3, 32, 4),
        (17, 64, 16, 1),
        (64, 1, 64, 4),
        (2, 3, 128, 1),
    ],
)
def test_every_size_of_the_published_grid(batch: int, time: int, dim: int, heads: int) -> None:
    """As the loop has them (arXiv 2412.07752), also those that the loop is quicker for; weights
    small enough that rounding does not grow over steps."""
    inputs = operands(batch, time, heads, dim, dim)
    inputs[1:3] = [x * dim**-0.5 for x in inputs[1:3]]
    compare(inputs, None, False, torch.float32, 1e-6)


def compare(
    inputs: list[Tensor], ids: Tensor | None, fresh: bool, dtype: torch.dtype, limit: float
) -> None:
    """With the loop in float64."""

    def own(x: Tensor, weight: Tensor, r: Tensor, bias: Tensor, state: Tensor) -> list[Tensor]:
        gates = torch.einsum("bthi,hgoi->btgho", x, weight)
        first = None if fresh else state
        options = {"initial_state": first, "segment_ids": ids, "backend": "reference"}
        r, bias = r.transpose(0, 1), bias.transpose(0, 1)
        return [*nonlinear_rnn("lstm", gates, r, bias=bias, **options), state]

    def library(*x: Tensor) -> list[Tensor]:
        return [*lstm(*x[:4], None if fresh else x[4], ids), x[4]]

    x, weight, *rest = inputs
    found = gradients(library, [x.to(dtype), weight.to(dtype), *rest])
    assert (found[0][0].dtype, found[0][1].dtype) == (dtype, torch.float32)
    expected = gradients(own, [x.double() for x in inputs])
    for x, y in zip(found[0] + found[1], expected[0] + expected[1], strict=True):
        assert_ratio("library", x, y, limit)


def test_it_is_left_to_the_loop_where_it_does_not_serve() -> None:
    x = operands()[0]
    least = lstm_library.LEAST * HEADS
    short = torch.arange(TIME).expand(BATCH, TIME) // (least // 2)
    assert served(x, None)
    assert not served(x, short)
    assert served(x[:, :least], None)
    assert not served(x[:, : least - 1], None)
    assert not served(x.double(), None)
    assert not served(x.half(), None)
    assert not served(x.to("meta"), None)
    with torch.backends.mkldnn.flags(enabled=False):
        assert not served(x, None)
    with torch.autocast("cpu"):
        assert not served(x, None)


def layer() -> torch.nn.Module:
    config = ModelConfig(vocab_size=8, dim=12, num_layers=1, ffn_dim=8, pattern=["lstm"])
    torch.manual_seed(0)
    mixer = MIXERS["lstm"](config, RNNOptions(num_heads=2), 0)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.normal_(std=0.5)
    return mixer


@pytest.mark.parametrize("ids", [None, LONG], ids=["one", "documents"])
def test_the_mixer_takes_it(ids: Tensor | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs, state and gradients of a layer as without it; carried state too."""
    mixer, calls, found = layer(), [], []
    x = torch.randn(BATCH, TIME, 12, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(lstm_library, "lstm", lambda *a: calls.append(1) or lstm(*a))
    places = torch.arange(TIME).expand(BATCH, TIME)
    ctx = SequenceContext(positions=places, segment_ids=ids)
    for library in (True, False):
        if not library:
            monkeypatch.setattr(lstm_library, "served", lambda *_: False)
        _, state = mixer(x.flip(1), dataclasses.replace(ctx, segment_ids=None))
        y, after = mixer(x, ctx, state)
        grads = torch.autograd.grad(y.square().sum(), list(mixer.parameters()))
        found.append([y, after["recurrent"], *grads])
    assert len(calls) == 2
    for each, expected in zip(*found, strict=True):
        assert_ratio("mixer", each, expected, 1e-5)


def test_documents_know_nothing_of_each_other() -> None:
    """Bit for bit: another first document, cut at the same places, leaves what follows it."""
    x, *rest = operands()
    other = x.clone()
    other[1:, :30] = torch.randn(BATCH - 1, 30, HEADS, INPUTS)
    (h, last), (changed, after) = (lstm(each, *rest, LONG) for each in (x, other))
    assert not torch.equal(h[1:, :30], changed[1:, :30])
    assert torch.equal(h[1:, 30:], changed[1:, 30:])
    assert torch.equal(h[0], changed[0]) and torch.equal(last, after)


def test_decoding_goes_on_where_the_prompt_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt by torch's layer, then tokens one by one by the loop, as all at once by the loop."""
    mixer, calls, found = layer(), [], []
    x = torch.randn(BATCH, TIME, 12, generator=torch.Generator().manual_seed(2))
    places = torch.arange(TIME).expand(BATCH, TIME)
    monkeypatch.setattr(lstm_library, "lstm", lambda *a: calls.append(a[0].shape[1]) or lstm(*a))
    state, start = None, TIME - 4
    for stop in (start, *range(start + 1, TIME + 1)):
        begin = 0 if stop == start else stop - 1
        ctx = SequenceContext(positions=places[:, begin:stop], segment_ids=None)
        y, state = mixer(x[:, begin:stop], ctx, state)
        found.append(y)
    assert calls == [start]
    monkeypatch.setattr(lstm_library, "served", lambda *_: False)
    expected, after = mixer(x, SequenceContext(positions=places, segment_ids=None))
    assert_ratio("outputs", torch.cat(found, 1), expected, 1e-5)
    assert_ratio("state", state["recurrent"], after["recurrent"], 1e-5)


def test_a_cut_gradient_is_left_to_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lstm_library, "lstm", None)
    mixer = layer()
    mixer.options = RNNOptions(num_heads=2, gradient_recurrent_cut=True)
    places = torch.arange(TIME).expand(BATCH, TIME)
    mixer(torch.randn(BATCH, TIME, 12), SequenceContext(positions=places, segment_ids=None))


def test_its_flops_are_counted() -> None:
    """Two matrices a gate and head, backward twice that."""
    x, *rest = (each.requires_grad_() for each in operands())
    with FlopCounterMode(display=False) as counter:
        h, _ = lstm(x, *rest, None)
        forward = counter.get_total_flops()
        h.sum().backward()
    assert forward == 2 * BATCH * TIME * HEADS * 4 * DIM * (INPUTS + DIM)
    assert counter.get_total_flops() == 3 * forward
