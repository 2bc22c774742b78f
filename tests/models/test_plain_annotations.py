"""A router in a module without `from __future__ import annotations`: its types are no strings."""

from dataclasses import dataclass
from typing import Any, Optional

import pytest
from torch import Tensor

from rondo.errors import UserError
from rondo.models import ROUTERS, Decoder, ModelConfig
from rondo.models.config import problems, read_options
from rondo.models.ffn.router import Carry, Projection, Router

pytestmark = pytest.mark.quick


@dataclass
class PlainOptions:
    """Hyper-parameters of `plain`."""

    power: float = 1.0
    """Factor of the scores."""
    width: Optional[int] = None  # noqa: UP045  (the older way to write it)
    """Not used."""
    signed: bool | None = None
    """Not used."""
    parts: list[int] | None = None
    """A type that options cannot have."""


class PlainRouter(Router):
    """Scaled linear scores."""

    Options = PlainOptions

    def __init__(self, config: ModelConfig, options: PlainOptions, experts: int) -> None:
        super().__init__(config, options, experts)
        self.scores = Projection(config.dim, experts, std=config.init_std)

    def forward(self, x: Tensor, carry: Carry, shared: dict[str, Any]) -> tuple[Tensor, Carry]:
        return self.options.power * self.scores(x), carry


def config(**options: Any) -> ModelConfig:
    return ModelConfig(
        vocab_size=8,
        dim=16,
        num_layers=1,
        pattern=["attention+moe"],
        ffns={"moe": {"router": "plain"}},
        routers={"plain": options},
    )


def test_options_of_real_types_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ROUTERS, "plain", PlainRouter)
    model = Decoder(config(power=2, width=None, signed=True))
    assert model.blocks["0"].ffn.router.options == PlainOptions(2, None, True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"power": "high"}, "model.routers.plain.power: expected float, got 'high'"),
        ({"power": True}, "model.routers.plain.power: expected float, got True"),
        ({"width": 0.5}, "model.routers.plain.width: expected Optional[int], got 0.5"),
        ({"signed": 1}, "model.routers.plain.signed: expected bool | None, got 1"),
    ],
)
def test_wrong_options_are_named(
    options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ROUTERS, "plain", PlainRouter)
    assert problems(config(**options)) == [message]
    with pytest.raises(UserError):
        Decoder(config(**options))


def test_types_that_options_cannot_have_are_named() -> None:
    with pytest.raises(TypeError, match=r"place\.parts: .* not of list\[int\]"):
        read_options(PlainOptions, {"parts": [1]}, "place")
