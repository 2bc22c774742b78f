"""On a CUDA device: every operator and mixer gives what the float64 reference gives on a CPU.

Needs torch, numpy and pytest alone.
"""

from __future__ import annotations

import pytest
import torch

from rondo.kernels import (
    attention,
    gated_delta_rule,
    gated_linear_attention,
    l2_norm,
    linear_cross_entropy,
    linear_scan,
    short_conv,
)
from rondo.models import MIXERS, Decoder, ModelConfig, generate
from rondo.tests.numerics import assert_ratio, gradients

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
B, T, H, K, V = 2, 300, 4, 32, 64


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def segments() -> torch.Tensor:
    ids = torch.zeros(B, T, dtype=torch.long)
    ids[:, 100:] = 1
    ids[1, 101:] = 2
    return ids


q, k, v = (random(B, T, H, d, seed=i) for i, d in enumerate((K, K, V)))
state = random(B, H, K, V, seed=3)
beta = random(B, T, H, seed=4).sigmoid()
head_decay = -random(B, T, H, seed=5).exp()
key_decay = -random(B, T, H, K, seed=6).exp()
x, weight = random(B, T, 48, seed=7), random(48, 4, seed=8)
OPERATORS = {
    "linear_scan": (linear_scan, [random(B, T, 9, seed=9).sigmoid(), random(B, T, 9, seed=10)]),
    "linear_attention": (gated_linear_attention, [q, k, v]),
    "linear_attention_head": (gated_linear_attention, [q, k, v, head_decay]),
    "linear_attention_key": (gated_linear_attention, [q, k, v, key_decay]),
    "delta_rule": (gated_delta_rule, [q, l2_norm(k), v, beta]),
    "delta_rule_head": (gated_delta_rule, [q, l2_norm(k), v, beta, head_decay]),
    "delta_rule_key": (gated_delta_rule, [q, l2_norm(k), v, beta, key_decay]),
    "short_conv": (short_conv, [x, weight]),
    "attention": (attention, [q, k, v]),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OPERATORS)
def test_operator(name: str, dtype: torch.dtype) -> None:
    operator, inputs = OPERATORS[name]

    def run(backend: str, ids: torch.Tensor):
        def call(*args: torch.Tensor) -> list[torch.Tensor]:
            result = operator(*args, segment_ids=ids, backend=backend)
            return [result[0] if isinstance(result, tuple) else result]

        return call

    expected = gradients(run("reference", segments()), inputs)
    moved = [value.to("cuda", dtype) for value in inputs]
    actual = gradients(
        lambda *args: [y.cpu() for y in run("auto", segments().cuda())(*args)], moved
    )
    limit = {torch.float64: 1e-9, torch.float32: 2e-3, torch.bfloat16: 5e-2}[dtype]
    for got, want in zip([*actual[0], *actual[1]], [*expected[0], *expected[1]], strict=True):
        assert_ratio(name, got.cpu(), want, limit)


def test_cross_entropy() -> None:
    hidden, table = random(64, 32, seed=11), random(500, 32, seed=12)
    targets = torch.arange(64) * 7

    def run(h: torch.Tensor, w: torch.Tensor) -> list[torch.Tensor]:
        return [linear_cross_entropy(h, w, targets.to(h.device), reduction="sum").cpu()]

    expected, actual = (
        gradients(run, [hidden, table]),
        gradients(run, [hidden.cuda(), table.cuda()]),
    )
    for got, want in zip([*actual[0], *actual[1]], [*expected[0], *expected[1]], strict=True):
        assert_ratio("cross entropy", got.cpu(), want, 1e-9)


@pytest.mark.parametrize("mixer", sorted(MIXERS))
def test_decoder_trains_and_generates(mixer: str) -> None:
    config = ModelConfig(vocab_size=64, dim=64, num_layers=2, pattern=[mixer])
    tokens = torch.randint(0, 64, (2, 200), generator=torch.Generator().manual_seed(0))
    losses = []
    for device in ("cpu", "cuda"):
        model = Decoder(config, seed=0).double().to(device)
        loss = model.loss(tokens[:, :-1].to(device), tokens[:, 1:].to(device), reduction="mean")
        loss.backward()
        norm = sum(p.grad.square().sum() for p in model.parameters()).sqrt()
        losses.append((loss.item(), norm.item()))
    assert losses[1] == pytest.approx(losses[0], rel=1e-7)
    model.to(torch.bfloat16)
    assert generate(model, tokens[:, :9].cuda(), max_tokens=5).shape == (2, 14)
