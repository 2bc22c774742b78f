"""A sequence mixer and a channel mixer as a user would write them, for tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from rondo.kernels import linear_scan
from rondo.models import MIXERS, Mixer
from rondo.models.config import ModelConfig
from rondo.models.layers import Linear, at_least_float32
from rondo.models.mixer import ChannelMixer, SequenceContext, State, get
from rondo.models.registry import FFNS


@contextmanager
def registered() -> Iterator[None]:
    """The toys are registered inside: a mixer `toy`, a channel mixer `toy_router`."""
    MIXERS["toy"], FFNS["toy_router"] = Toy, ToyRouter
    try:
        yield
    finally:
        del MIXERS["toy"], FFNS["toy_router"]


@dataclass
class ToyOptions:
    """No hyper-parameters."""


class Toy(Mixer):
    """An exponential moving average with a learned, data-dependent rate a channel."""

    Options = ToyOptions
    sharding = {"in_proj": "column", "rate_proj": "column", "out_proj": "row"}  # noqa: RUF012

    def __init__(self, config: ModelConfig, options: ToyOptions, layer: int) -> None:
        super().__init__(config, options, layer)
        self.scan = linear_scan
        self.in_proj = Linear(config.dim, config.dim, std=config.init_std)
        self.rate_proj = Linear(config.dim, config.dim, std=config.init_std)
        self.out_proj = Linear(config.dim, config.dim, std=config.residual_std)

    @classmethod
    def heads(cls, config: ModelConfig, options: ToyOptions) -> dict[str, int]:
        return {"dim": config.dim}

    def forward(
        self, x: Tensor, ctx: SequenceContext, state: State | None = None
    ) -> tuple[Tensor, State]:
        keep = at_least_float32(self.rate_proj(x)).sigmoid()
        h, last = self.scan(
            keep,
            (1 - keep) * self.in_proj(x),
            initial_state=get(state, "recurrent"),
            segment_ids=ctx.segment_ids,
        )
        return self.out_proj(h.to(x.dtype)), {"recurrent": last}

    def state_shapes(
        self, batch: int, length: int
    ) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return {"recurrent": ((batch, self.config.dim), torch.float32)}

    def operator_flops(self, length: int) -> float:
        return 2.0 * self.config.dim


class ToyRouter(ChannelMixer):
    """Gates its inner channels by a small state that it gets from the layer below and hands on."""

    sharding = {  # noqa: RUF012
        "up_proj": "column",
        "gate_proj": "column",
        "down_proj": "row",
        "read": "replicate",
        "recur": "replicate",
    }
    width = 6

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        inner, std = config.inner_dim, config.init_std
        self.up_proj = Linear(config.dim, inner, std=std)
        self.gate_proj = Linear(self.width, inner, std=std)
        self.down_proj = Linear(inner, config.dim, std=config.residual_std)
        self.read = Linear(config.dim, self.width, std=std)
        self.recur = Linear(self.width, self.width, std=1.0)

    @classmethod
    def carried(cls, config: ModelConfig) -> dict[str, int]:
        return {"toy_state": cls.width}

    @classmethod
    def splits(cls, config: ModelConfig) -> dict[str, int]:
        return {"ffn_dim": config.inner_dim}

    def forward(self, x: Tensor, carry: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        before = carry["toy_state"]
        state = torch.tanh(self.read(x).to(before.dtype) + self.recur(before))
        inner = self.up_proj(x) * (1 + self.gate_proj(state.to(x.dtype)))
        return self.down_proj(inner), {**carry, "toy_state": state}
