"""What is special about `para_gru` and `para_lstm`: their equations, bounds and health."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rondo.errors import UserError
from rondo.kernels import newton_rnn
from rondo.kernels.newton_rnn import CELLS
from rondo.kernels.newton_rnn.sweeps import Rows, forward
from rondo.models import Decoder, ModelConfig
from rondo.models.mixers.para_rnn import ParaRNN
from rondo.parallel.bounds import keep_bounds
from rondo.parallel.counts import take_gauges
from rondo.parallel.mesh import Ranks
from rondo.tests.kernels.test_newton_rnn import iterates
from rondo.tests.mixer_suite import Case, build, context, inputs
from rondo.tests.numerics import assert_ratio

pytestmark = pytest.mark.quick
NAMES = ("para_gru", "para_lstm")
ALONE = Ranks(0, 1, torch.device("cpu"), None)
DIM, HEADS, TIME = 32, 4, 40


def decoder(name: str, layers: int = 2, dim: int = DIM, **options: Any) -> Decoder:
    config = ModelConfig(
        vocab_size=11, dim=dim, num_layers=layers, pattern=[name], mixers={name: options}
    )
    return Decoder(config, seed=0)


def by_equations(name: str, mixer: ParaRNN, x: Tensor) -> Tensor:
    """The layer of one document from its parameters alone, token by token."""
    p = dict(mixer.named_parameters())
    u = F.pad(x @ p["x_proj.weight"].T, (0, 0, 3, 0))
    u = F.silu(sum(u[:, i : i + x.shape[1]] * p["x_conv.weight"][:, i] for i in range(4)))
    # Block-diagonal input matrices, one a gate, and vectors over all channels.
    gates = [u @ torch.block_diag(*p["mix"][:, g]).T + p["bias"][:, g].flatten() for g in range(3)]
    a = p["recurrent"].transpose(0, 1).flatten(1)
    c = h = torch.zeros_like(u[:, 0])
    outputs = []
    for t in range(x.shape[1]):
        one, two, three = (gate[:, t] for gate in gates)
        if name == "para_gru":
            z, r = torch.sigmoid(one + a[0] * h), torch.sigmoid(two + a[1] * h)
            h = (1 - z) * h + z * torch.tanh(three + a[2] * h * r)
        else:
            f = torch.sigmoid(one + a[0] * h + a[3] * c)
            c = f * c + (1 - f) * torch.tanh(three + a[2] * h)
            h = torch.sigmoid(two + a[1] * h + a[4] * c) * torch.tanh(c)
        outputs.append(h)
    y = torch.stack(outputs, 1)
    y = y * (y.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * p["norm.weight"]
    return (y * F.silu(x @ p["gate_proj.weight"].T)) @ p["o_proj.weight"].T


@pytest.mark.parametrize("name", NAMES)
def test_equations(name: str) -> None:
    mixer, shared = build(Case(name))
    assert isinstance(mixer, ParaRNN)
    x = inputs(Case(name), 2, TIME)
    assert_ratio("output", mixer(x, context(x, shared))[0], by_equations(name, mixer, x), 1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_initial_values(name: str) -> None:
    """N(0, 2 / √(5 width)) within the bound; Xavier in each head; a bias from 0 to -1."""
    mixer = decoder(name, 1, 256, max_recurrent=None).blocks["0"].mixer
    assert abs(float(mixer.recurrent.detach().std()) / (2 / math.sqrt(5 * 256)) - 1) < 0.1
    bound = math.sqrt(3 / 64)
    assert 0.99 * bound < float(mixer.mix.detach().abs().max()) <= bound
    falling = -torch.linspace(0, 1, 256)
    assert torch.equal(mixer.bias[:, 0].flatten(), falling) and not mixer.bias[:, 1:].any()
    tight = decoder(name, 1, max_recurrent=0.05).blocks["0"].mixer.recurrent
    assert float(tight.abs().max()) == pytest.approx(0.05)


def test_recurrent_weights_are_cut_back_after_a_step() -> None:
    bounded, free = decoder("para_gru"), decoder("para_gru", max_recurrent=None)
    for model in (bounded, free):
        model.blocks["1"].mixer.recurrent.data.fill_(-3.0)
        keep_bounds([model])
    assert torch.all(bounded.blocks["1"].mixer.recurrent == -0.5)
    assert torch.all(free.blocks["1"].mixer.recurrent == -3.0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-7), (torch.float32, 1e-5)])
def test_three_iterations_of_a_layer_as_it_begins(
    name: str, dtype: torch.dtype, limit: float
) -> None:
    """Of 2,048 single positions (N3 of arXiv 2510.21450's figures); chunks only help."""
    given: dict[str, Any] = {}

    def scan(cell: str, gates: Tensor, recurrent: Tensor, **options: Any) -> Any:
        given.update(gates=gates.detach(), recurrent=recurrent.detach(), bias=options["bias"])
        return newton_rnn(cell, gates, recurrent, **options)

    mixer = decoder(name, dim=64).blocks["0"].mixer.double()
    mixer.scan = scan
    x = torch.randn(1, 2048, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mixer(x, context(x, {}))
    gates = (given["gates"] + given["bias"].detach()).flatten(3)
    first = gates.new_zeros(CELLS[name].variables, 1, 1, 64)
    rows = Rows(CELLS[name], gates, given["recurrent"].flatten(1), None, None, 1)
    exact = forward(rows._replace(size=2048), first, False).states[-1]
    rows = rows._replace(gates=gates.to(dtype), weights=rows.weights.to(dtype))
    guessed, _, _, third = iterates(rows, first.to(dtype), 3)
    assert (guessed[-1] - exact).abs().max() > 1e-3
    assert (third[-1] - exact).abs().max() < limit


@pytest.mark.parametrize("name", NAMES)
def test_health_reaches_the_metrics_by_layer(name: str) -> None:
    """Calm in one layer, a fallback in the other; once, and only of training."""
    model = decoder(name, iterations=1, max_iterations=2, max_recurrent=None)
    model.blocks["1"].mixer.recurrent.data.fill_(8.0)
    model.blocks["1"].mixer.mix.data.mul_(4.0)
    tokens = (torch.arange(200) * 7 % 11).expand(3, -1)
    model(tokens)
    found = take_gauges([model], ALONE)
    assert set(found) == {
        f"newton_{what}/{layer:02d}"
        for what in ("residual", "product", "iterations", "fallback")
        for layer in (0, 1)
    } | {"newton/fallbacks"}
    assert found["newton/fallbacks"] == 1
    assert found["newton_fallback/00"] == 0 < found["newton_iterations/00"]
    assert found["newton_residual/00"] <= 1e-6 and 0 < found["newton_product/00"] < 1
    assert (found["newton_fallback/01"], found["newton_iterations/01"]) == (1, 2)
    assert found["newton_residual/01"] > 1e-6
    model.eval()
    model(tokens)
    assert not any(take_gauges([model], ALONE).values())
    plain = ModelConfig(vocab_size=11, dim=16, num_layers=1, pattern=["retnet"])
    assert take_gauges([Decoder(plain, seed=0)], ALONE) == {}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_heads": 5}, "num_heads: inner width 32 is not divisible by 5"),
        ({"iterations": 11}, "iterations: 11 are more than max_iterations, 10"),
        ({"tolerance": 2.0}, "tolerance: must be below 1, got 2.0"),
        ({"memory": 2.0}, "memory: must be above 2, got 2"),
    ],
)
def test_impossible_options_are_named(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        decoder("para_gru", **options)


@pytest.mark.parametrize("name", NAMES)
def test_recurrent_weights_begin_as_asked(name: str) -> None:
    wide, cut, usual = (
        decoder(name, **options).blocks["0"].mixer.get_parameter("recurrent")  # type: ignore[union-attr]
        for options in (
            {"max_recurrent": None, "recurrent_std": 2.0},
            {"recurrent_std": 2.0},
            {"max_recurrent": None},
        )
    )
    assert 1.5 < wide.std() < 2.5 and usual.std() < 0.25
    assert torch.equal(cut, wide.clamp(-0.5, 0.5))


@pytest.mark.parametrize("name", NAMES)
def test_channels_begin_with_the_memory_asked_for(name: str) -> None:
    model, usual = decoder(name, memory=101.0), decoder(name)
    gate, *others = model.blocks["0"].mixer.get_parameter("bias").transpose(0, 1)  # type: ignore[union-attr]
    replaced = torch.sigmoid(gate if name == "para_gru" else -gate).flatten()
    assert math.isclose(replaced[0], 1 / 2) and math.isclose(replaced[-1], 1 / 101, rel_tol=1e-5)
    assert (replaced.diff() < 0).all() and all(not other.any() for other in others)
    bias = usual.blocks["0"].mixer.get_parameter("bias")  # type: ignore[union-attr]
    assert bias[0, 0, 0] == 0 and bias[-1, 0, -1] == -1
