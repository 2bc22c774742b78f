"""Gated DeltaNet: the delta rule with a decay of its own for every token and head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from rondo.models.config import ModelConfig
from rondo.models.init import inverse_softplus_step, log_uniform, parameter
from rondo.models.layers import Linear, at_least_float32
from rondo.models.mixers.deltanet import DeltaNet
from rondo.models.registry import MIXERS


@dataclass
class GatedDeltaNetOptions:
    """Hyper-parameters of `gated_deltanet`."""

    num_heads: int | None = None
    """Heads; None: so many that heads·head_dim is about 3/4 of dim."""
    head_dim: int | None = None
    """Width of queries and keys in a head; None: 256, or dim / 4 where that is less."""
    expand_v: float = 2.0
    """Width of values in a head over head_dim."""
    conv_width: int = 4
    """Taps of the short convolution on queries, keys and values."""
    negative_eigenvalues: bool = False
    """Let beta range over [0, 2], so that a step can reflect (arXiv 2411.12537)."""
    output_gate: bool = True
    """Multiply the normalised output by SiLU of a projection of the input."""
    max_step: float = 0.1
    """Largest softplus(dt_bias) of a head at the start; they begin log-uniform from a hundredth of
    it. From 0.1 two heads of five keep less than 0.9 of their state at a token, from 0.001 all
    keep more than 0.98: for recall by one or two heads."""


@MIXERS.register("gated_deltanet")
class GatedDeltaNet(DeltaNet):
    """Gated DeltaNet (arXiv 2412.06464): DeltaNet whose state first shrinks by
    `exp(-exp(A_log) · softplus(W_a x + dt_bias))`. State as DeltaNet's."""

    Options: ClassVar[type] = GatedDeltaNetOptions
    sharding: ClassVar = {
        **DeltaNet.sharding,
        "decay_proj": "column",
        "A_log": "head",
        "dt_bias": "head",
    }
    float32_parameters: ClassVar = ("A_log", "dt_bias")

    def __init__(self, config: ModelConfig, options: Any, layer: int) -> None:
        super().__init__(config, options, layer)
        self.decay_proj = Linear(config.dim, self.num_heads, std=config.init_std)
        # The paper draws A from U(0, 16), whose log can be -inf; Mamba-2's U(1, 16) cannot.
        self.A_log = parameter((self.num_heads,), log_uniform(1, 16))
        self.dt_bias = parameter((self.num_heads,), inverse_softplus_step(options.max_step))

    @classmethod
    def problems(cls, config: ModelConfig, options: Any) -> list[str]:
        found = super().problems(config, options)
        if options.max_step <= 0:
            found.append(f"max_step: must be above 0, got {options.max_step}")
        return found

    @classmethod
    def sizes(cls, config: ModelConfig, options: Any) -> tuple[int, int, int]:
        head_dim = options.head_dim or min(256, max(1, config.dim // 4))
        heads = options.num_heads or max(1, round(0.75 * config.dim / head_dim))
        return heads, head_dim, int(head_dim * options.expand_v)

    def log_decay(self, x: Tensor) -> Tensor:
        step = F.softplus(at_least_float32(self.decay_proj(x)) + self.dt_bias)
        return -self.A_log.exp() * step
