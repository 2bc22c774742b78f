"""Low-rank adapters: what is trained, what it starts as, and what is left when it is merged."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from rondo.errors import UserError
from rondo.models import Decoder, ModelConfig
from rondo.models.config import problems
from rondo.models.lora import merged

pytestmark = pytest.mark.quick
BASE = ModelConfig(
    vocab_size=30,
    dim=32,
    num_layers=2,
    ffn_dim=48,
    pattern=["liger", "gla"],
    mixers={"liger": {"num_heads": 4, "num_kv_heads": 2, "window": 3}, "gla": {"num_heads": 2}},
)


def adapted(**changes: Any) -> Decoder:
    changes = {"lora_rank": 3, "lora_alpha": 6.0, **changes}
    return Decoder(dataclasses.replace(BASE, **changes), seed=1)


def logits(model: Decoder) -> torch.Tensor:
    tokens = torch.arange(20).view(2, 10)
    with torch.no_grad():
        return model.logits(model(tokens).hidden)


def test_a_model_with_adapters_begins_as_the_model_without() -> None:
    model, base = adapted(), Decoder(BASE, seed=1)
    assert torch.equal(logits(model), logits(base))
    there = model.state_dict()
    assert all(torch.equal(there[name], value) for name, value in base.state_dict().items())
    assert there.keys() - base.state_dict().keys() == model.optional_names()


def test_adapters_alone_are_trained() -> None:
    """r (in + out) numbers a matrix: q, k, v are 32, 16, 16 wide (liger), 16, 16, 32 (gla)."""
    model = adapted()
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    assert sum(trained.values()) == 2 * (3 * (32 + 32) + 2 * 3 * (32 + 16))
    assert set(trained) == model.optional_names()
    model.loss(torch.arange(10)[None], torch.arange(1, 11)[None]).backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == set(trained)


def test_merged_weights_compute_the_same() -> None:
    targets = ["q_proj", "k_proj", "o_proj", "decay_up", "down_proj"]
    model = adapted(lora_targets=targets)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if name.endswith("lora_b.weight"):
                param.normal_(0, 0.3, generator=torch.Generator().manual_seed(2))
    config, tensors = merged(model.config, model.state_dict())
    assert config == dataclasses.replace(BASE, lora_targets=targets, lora_alpha=6.0)
    plain = Decoder(config)
    plain.load_state_dict(tensors)
    assert (logits(model) - logits(Decoder(BASE, seed=1))).abs().max() > 0.01
    torch.testing.assert_close(logits(plain), logits(model), rtol=1e-4, atol=1e-5)


def test_their_cost_is_counted() -> None:
    there, base = adapted().cost(16), Decoder(BASE, seed=1).cost(16)
    more = there.parameters - base.parameters
    assert more == 960 and there.flops - base.flops == 2 * more


def test_mistakes_are_named() -> None:
    with pytest.raises(
        UserError, match=r"lora_targets: no matrix is called 'query' \(known: .*q_p"
    ):
        adapted(lora_targets=["q_proj", "query"])
    wrong = dataclasses.replace(BASE, lora_rank=-1, lora_alpha=0, lora_targets=[])
    assert len(problems(wrong)) == 3
