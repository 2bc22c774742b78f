"""A new router is one class: one that carries a state, shares weights and counts its FLOPs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from rondo.models import ROUTERS, ModelConfig
from rondo.models.config import problems
from rondo.models.ffn.router import Carry, Projection, Router
from rondo.models.init import normal, parameter
from rondo.models.layers import Linear
from rondo.parallel.build import ParallelModel
from rondo.parallel.config import ParallelConfig
from rondo.parallel.mesh import Ranks
from rondo.parallel.pipeline import MicroBatch
from rondo.pretrain.routing import router_gradients
from rondo.tests.models import test_routers
from rondo.tests.models.test_routers import decoder, inputs, tokens

pytestmark = pytest.mark.quick


@dataclass
class DepthOptions:
    """Hyper-parameters of `depth`."""

    width: int = 8
    """Width of the state."""


class Recurrence(nn.Module):
    """The matrix of all layers."""

    float32_parameters: ClassVar = ("weight",)

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = parameter((width, width), normal(width**-0.5))

    def forward(self) -> Tensor:
        return self.weight


class DepthRouter(Router):
    """`a_i = G_i h_i`, `h_i = tanh(P_i x_i + U h_{i-1})`."""

    Options = DepthOptions

    def __init__(self, config: ModelConfig, options: DepthOptions, experts: int) -> None:
        super().__init__(config, options, experts)
        self.proj = Projection(config.dim, options.width, std=config.dim**-0.5)
        self.scores = Linear(options.width, experts, std=options.width**-0.5)

    @classmethod
    def carried(cls, config: ModelConfig, options: DepthOptions, experts: int) -> dict[str, int]:
        return {"depth_state": options.width}

    @classmethod
    def shared_modules(cls, config: ModelConfig, options: DepthOptions) -> dict[str, nn.Module]:
        return {"depth": Recurrence(options.width)}

    @classmethod
    def problems(cls, options: DepthOptions) -> list[str]:
        return ["width: must be even"] if options.width % 2 else []

    def forward(self, x: Tensor, carry: Carry, shared: dict[str, Any]) -> tuple[Tensor, Carry]:
        state = torch.tanh(self.proj(x) + F.linear(carry["depth_state"], shared["depth"]))
        return self.scores(state), carry | {"depth_state": state}

    def flops(self) -> float:
        return super().flops() + 2 * self.options.width**2


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(ROUTERS, "depth", DepthRouter)
    yield


def test_it_is_a_router_like_any_other() -> None:
    test_routers.test_every_router("depth")
    frozen = decoder("depth", moe={"freeze_router": True})
    names = {name for name, param in frozen.named_parameters() if not param.requires_grad}
    assert "shared.depth.weight" in names and "blocks.0.ffn.router.scores.weight" in names


def test_its_flops_are_counted() -> None:
    model = decoder("depth", width=6)
    moe, x = model.blocks["0"].ffn, inputs(1, 64, 16)
    carry = {name: x.new_zeros(1, 64, width) for name, width in model.carried.items()}
    with FlopCounterMode(display=False) as counter:
        moe(x, carry, {name: module() for name, module in model.shared.items()})
    assert moe.cost(64).flops == counter.get_total_flops() / 64


def test_its_problems_are_named() -> None:
    config = decoder("depth").config
    config.routers["depth"] = {"width": 3}
    assert problems(config) == ["model.routers.depth.width: must be even"]


def test_the_gradient_of_what_it_shares_is_a_routers() -> None:
    config, alone = decoder("depth").config, Ranks(0, 1, torch.device("cpu"), None)
    model = ParallelModel(config, alone, ParallelConfig(), precision="float64", seed=0, length=12)
    ids = tokens()
    batch = MicroBatch(ids, ids, torch.zeros_like(ids), torch.arange(12).expand(2, 12))
    found = router_gradients(model, [batch], 24)["router_grad_norm/tokens"]
    part = model.parts[0]
    loss = part.hidden_loss(part(ids).hidden, ids) / 24
    params = [p for n, p in part.named_parameters() if ".router." in n or n.startswith("shared.")]
    grads = torch.autograd.grad(loss, params)
    assert found == pytest.approx(sum(float(grad.square().sum()) for grad in grads) ** 0.5)
