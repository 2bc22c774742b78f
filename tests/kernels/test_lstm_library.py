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


def operands() -> list[Tensor]:
    """x, weight, recurrent, bias, state."""
    generator = torch.Generator().manual_seed(0)
    shapes = (
        (BATCH, TIME, HEADS, INPUTS),
        (HEADS, 4, DIM, INPUTS),
        (HEADS, 4, DIM, DIM),
        (HEADS, 4, DIM),
        (BATCH, 2, HEADS, DIM),
    )
    return [0.5 * torch.randn(*shape, generator=generator) for shape in shapes]


@pytest.mark.parametrize("ids", [None, LONG], ids=["one", "documents"])
@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_it_equals_the_loop(
    ids: Tensor | None, fresh: bool, dtype: torch.dtype, limit: float
) -> None:
    """Outputs, state and every gradient, with documents and carried state."""

    def own(x: Tensor, weight: Tensor, r: Tensor, bias: Tensor, state: Tensor) -> list[Tensor]:
        gates = torch.einsum("bthi,hgoi->btgho", x, weight)
        first = None if fresh else state
        options = {"initial_state": first, "segment_ids": ids, "backend": "reference"}
        r, bias = r.transpose(0, 1), bias.transpose(0, 1)
        return [*nonlinear_rnn("lstm", gates, r, bias=bias, **options), state]

    def library(*x: Tensor) -> list[Tensor]:
        return [*lstm(*x[:4], None if fresh else x[4], ids), x[4]]

    x, weight, *rest = operands()
    x, weight = x.to(dtype), weight.to(dtype)
    assert served(x, ids)
    found = gradients(library, [x, weight, *rest])
    assert (found[0][0].dtype, found[0][1].dtype) == (dtype, torch.float32)
    expected = gradients(own, [x.double() for x in operands()])
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
