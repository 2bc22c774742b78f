"""A mixture under torch.compile computes what it does without."""

from __future__ import annotations

import pytest
import torch

from rondo.models.config import ModelConfig
from rondo.models.ffn.moe import MoE
from rondo.models.init import initial_values
from rondo.tests.numerics import assert_ratio

CONFIG = ModelConfig(
    dim=16,
    num_layers=1,
    pattern=["attention+moe"],
    ffns={"moe": {"num_experts": 4, "expert_dim": 16, "router": "linear", "balance_loss": 0.0}},
    init_std=0.3,
)


@torch.no_grad()
def mixture() -> MoE:
    moe = MoE(CONFIG)
    values = dict(initial_values(moe, seed=0))
    for name, param in moe.named_parameters():
        param.copy_(values[name])
    return moe


@pytest.mark.parametrize(
    ("dtype", "limit"),
    [(torch.float32, 1e-5), pytest.param(torch.bfloat16, 1e-2, marks=pytest.mark.slow)],
    ids=str,
)
def test_a_compiled_mixture_equals_an_eager_one(dtype: torch.dtype, limit: float) -> None:
    eager, compiled = mixture(), mixture()
    compiled.compile()
    x = torch.randn(2, 11, 16, generator=torch.Generator().manual_seed(1)).to(dtype)
    found = []
    for moe in (eager, compiled):
        own = x.clone().requires_grad_()
        y = moe(own)
        y.float().square().sum().backward()
        found.append([y, own.grad, *(p.grad for p in moe.parameters())])
    names = ["y", "x", *(name for name, _ in eager.named_parameters())]
    for name, expected, actual in zip(names, *found, strict=True):
        assert actual.dtype == expected.dtype, name
        assert_ratio(name, actual, expected, limit)
