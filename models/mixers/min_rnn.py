"""minGRU and minLSTM: gates that see the input alone, so that a scan computes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rondo.kernels import linear_scan
from rondo.models.config import ModelConfig
from rondo.models.layers import Linear, at_least_float32
from rondo.models.mixer import Mixer, SequenceContext, State, get
from rondo.models.registry import MIXERS


@dataclass
class MinRNNOptions:
    """Hyper-parameters of `min_gru` and `min_lstm`."""

    expand: int = 1
    """Inner width over dim."""


@MIXERS.register("min_gru")
class MinGRU(Mixer):
    """minGRU (arXiv 2410.01201): `h_t = (1 - z_t) h_{t-1} + z_t W_h x_t` with `z = σ(W_z x)`, and
    a projection back. What `gru` and `para_gru` are without the state in their gates. State:
    `recurrent` `(B, inner)` float32."""

    Options: ClassVar[type] = MinRNNOptions
    gates: ClassVar[tuple[str, ...]] = ("z",)
    h_proj: Linear
    sharding: ClassVar = {"z_proj": "column", "h_proj": "column", "o_proj": "row"}

    def __init__(self, config: ModelConfig, options: MinRNNOptions, layer: int) -> None:
        super().__init__(config, options, layer)
        self.scan = linear_scan
        self.inner = options.expand * config.dim
        for name in (*self.gates, "h"):
            setattr(self, f"{name}_proj", Linear(config.dim, self.inner, std=config.init_std))
        self.o_proj = Linear(self.inner, config.dim, std=config.residual_std)

    @classmethod
    def heads(cls, config: ModelConfig, options: MinRNNOptions) -> dict[str, int]:
        return {"expand": options.expand * config.dim}

    def keep_and_write(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What a channel keeps of its state and takes of its input; they add up to 1."""
        (z,) = self.scores(x)
        return torch.sigmoid(-z), torch.sigmoid(z)

    def scores(self, x: Tensor) -> list[Tensor]:
        """Of the gates, at least float32."""
        return [at_least_float32(getattr(self, f"{name}_proj")(x)) for name in self.gates]

    def forward(
        self, x: Tensor, ctx: SequenceContext, state: State | None = None
    ) -> tuple[Tensor, State]:
        keep, write = self.keep_and_write(x)
        h, recurrent = self.scan(
            keep,
            write * self.h_proj(x),
            initial_state=get(state, "recurrent"),
            segment_ids=ctx.segment_ids,
        )
        return self.o_proj(h.to(x.dtype)), {"recurrent": recurrent}

    def state_shapes(
        self, batch: int, length: int
    ) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return {"recurrent": ((batch, self.inner), torch.float32)}

    def operator_flops(self, length: int) -> float:
        return 2.0 * self.inner


@MIXERS.register("min_lstm")
class MinLSTM(MinGRU):
    """minLSTM (arXiv 2410.01201): `h_t = f' h_{t-1} + i' W_h x_t` with gates `f = σ(W_f x)`,
    `i = σ(W_i x)` divided by their sum. State as minGRU's."""

    gates = ("f", "i")
    sharding: ClassVar = {
        "f_proj": "column",
        "i_proj": "column",
        "h_proj": "column",
        "o_proj": "row",
    }

    def keep_and_write(self, x: Tensor) -> tuple[Tensor, Tensor]:
        f, i = (torch.nn.functional.logsigmoid(score) for score in self.scores(x))
        return torch.sigmoid(f - i), torch.sigmoid(i - f)
