"""ParaGRU and ParaLSTM: gated cells whose channels see their own state only, solved in parallel."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rondo.kernels import newton_rnn, short_conv
from rondo.kernels.newton_rnn import CELLS, Health
from rondo.models.config import ModelConfig
from rondo.models.init import Initializer, normal, parameter, uniform
from rondo.models.layers import GatedRMSNorm, Linear, ShortConv
from rondo.models.mixer import Mixer, SequenceContext, State, get, split_heads
from rondo.models.registry import MIXERS

GATES = 3


@dataclass
class ParaRNNOptions:
    """Hyper-parameters of `para_gru` and `para_lstm`."""

    num_heads: int = 4
    """Heads: the gates of a channel see the inputs of its own head."""
    expand: int = 1
    """Inner width over dim."""
    conv_width: int = 4
    """Taps of the short convolution on the cell's input."""
    max_recurrent: float | None = 0.5
    """Largest recurrent weight, by absolute value; None: no limit. Newton's method is sure to
    converge fast while they are small."""
    recurrent_std: float | None = None
    """Standard deviation of recurrent weights at the start; None: 2 / √(5 width). About 2, without
    a limit, lets channels flip and count from the start, at more Newton iterations."""
    memory: float | None = None
    """Positions over which the channel with the longest memory forgets at the start, above 2: the
    share of its state that a step replaces (z of a GRU, 1 - f of an LSTM) is one in so many; the
    channels' biases go there from one in two. None: biases from 0 to -1, the longest memory about
    4 positions for a GRU and 2 for an LSTM."""
    iterations: int = 3
    """Newton iterations that are expected; those beyond are counted."""
    max_iterations: int = 10
    """Iterations after which a layer's rows are done one position at a time."""
    tolerance: float | None = None
    """Largest residual of a solution, each relative to its own state (at least 1); None: 1e-6."""


class ParaRNN(Mixer):
    """A layer of ParaRNN (arXiv 2510.21450): with u = conv(W_x x) and v = W_g x,

        gates = B u + b    h = cell(gates)    y = W_o (norm(h) · SiLU(v))

    and B block-diagonal over heads. Recurrent weights begin with standard deviation 2 / √(5 width),
    or `recurrent_std`, B Xavier uniform within a head and gate, the first gate's bias goes from 0
    to -1 over the channels, or to what `memory` asks for, the others are 0. Norm over all channels.
    With `max_recurrent` training keeps recurrent weights within it (`bounds`).

    State: `recurrent` `(B, H, D)`, of an LSTM `(B, 2, H, D)` with c first, float32; `conv`
    `(B, conv_width - 1, H·D)`.
    """

    Options: ClassVar[type] = ParaRNNOptions
    state_heads: ClassVar[int] = -2
    cell: ClassVar[str]
    """Name of `newton_rnn`'s cell."""
    keeping: ClassVar[int]
    """Sign of a bias of the first gate that keeps the state."""
    sharding: ClassVar[dict[str, str]] = {
        "x_proj": "column",
        "gate_proj": "column",
        "x_conv": "head",
        "mix": "head",
        "bias": "head",
        "recurrent": "head",
        "norm": "head",
        "o_proj": "row",
    }
    exact: ClassVar[bool] = False
    float32_parameters: ClassVar[tuple[str, ...]] = ("recurrent", "bias")
    gauges: ClassVar[dict[str, str]] = {
        "newton_residual": "residual",
        "newton_product": "product",
        "newton_iterations": "iterations",
        "newton_fallback": "fallback",
    }
    layer_counts: ClassVar[dict[str, str]] = {"newton/fallbacks": "newton_fallback"}

    def __init__(self, config: ModelConfig, options: ParaRNNOptions, layer: int) -> None:
        super().__init__(config, options, layer)
        self.inner, self.num_heads = options.expand * config.dim, options.num_heads
        self.head_dim = self.inner // self.num_heads
        self.scan, self.conv = newton_rnn, short_conv
        self.variables, rows = CELLS[self.cell].variables, len(CELLS[self.cell].weights)
        self.x_proj = Linear(config.dim, self.inner, std=config.init_std)
        self.gate_proj = Linear(config.dim, self.inner, std=config.init_std)
        self.x_conv = ShortConv(self.inner, options.conv_width)
        heads, width = self.num_heads, self.head_dim
        bound = math.sqrt(3 / width)  # Xavier: √(6 / (inputs + outputs))
        self.mix = parameter((heads, GATES, width, width), uniform(-bound, bound))
        self.bias = parameter((heads, GATES, width), self._bias_values)
        self.recurrent = parameter((heads, rows, width), self._recurrent_values())
        self.norm = GatedRMSNorm(self.inner, config.norm_eps)
        self.o_proj = Linear(self.inner, config.dim, std=config.residual_std)
        for name in self.gauges.values():
            self.register_buffer(name, torch.zeros(()), persistent=False)

    def _recurrent_values(self) -> Initializer:
        std, limit = self.options.recurrent_std, self.options.max_recurrent
        draw = normal(2 / math.sqrt(5 * self.inner) if std is None else std)
        return lambda shape, generator: draw(shape, generator).clamp_(-(limit or 1e9), limit or 1e9)

    def _bias_values(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        heads, _, width = shape
        bias = torch.zeros(shape)
        memory = self.options.memory
        last = -1.0 if memory is None else self.keeping * math.log(memory - 1)
        bias[:, 0] = torch.linspace(0, last, heads * width).view(heads, width)
        return bias

    @classmethod
    def problems(cls, config: ModelConfig, options: ParaRNNOptions) -> list[str]:
        found, inner = [], options.expand * config.dim
        if inner % options.num_heads:
            found.append(f"num_heads: inner width {inner} is not divisible by {options.num_heads}")
        if options.iterations > options.max_iterations:
            found.append(
                f"iterations: {options.iterations} are more than max_iterations, "
                f"{options.max_iterations}"
            )
        if options.tolerance is not None and options.tolerance >= 1:
            found.append(f"tolerance: must be below 1, got {options.tolerance}")
        if options.memory is not None and options.memory <= 2:
            found.append(f"memory: must be above 2, got {options.memory:g}")
        return found

    @classmethod
    def heads(cls, config: ModelConfig, options: ParaRNNOptions) -> dict[str, int]:
        return {"num_heads": options.num_heads}

    def bounds(self) -> dict[str, float]:
        limit = self.options.max_recurrent
        return {} if limit is None else {"recurrent": limit}

    def forward(
        self, x: Tensor, ctx: SequenceContext, state: State | None = None
    ) -> tuple[Tensor, State]:
        after: State = {}
        u, after["conv"] = self.x_conv(
            self.x_proj(x),
            self.conv,
            initial_state=get(state, "conv"),
            segment_ids=ctx.segment_ids,
        )
        u = split_heads(u, self.head_dim)
        gates = torch.einsum("bthi,hgoi->btgho", u, self.mix.to(u.dtype))
        h, after["recurrent"], health = self.scan(
            self.cell,
            gates,
            self.recurrent.transpose(0, 1),
            bias=self.bias.transpose(0, 1),
            iterations=self.options.iterations,
            max_iterations=self.options.max_iterations,
            tolerance=self.options.tolerance,
            initial_state=get(state, "recurrent"),
            segment_ids=ctx.segment_ids,
        )
        if self.training:
            self.observe(health)
        return self.o_proj(self.norm(h.flatten(2), self.gate_proj(x))), after

    @torch.no_grad()
    def observe(self, health: Health) -> None:
        """Keeps the worst of a solve and those before it, on the device."""
        largest = {
            "residual": health.relative,
            "product": health.product,
            "iterations": health.iterations,
            "fallback": health.sequential,
        }
        for name, value in largest.items():
            buffer = self.get_buffer(name)
            buffer.copy_(torch.maximum(buffer, value.to(buffer.dtype)))

    def state_shapes(
        self, batch: int, length: int
    ) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        variables = () if self.variables == 1 else (self.variables,)
        return {
            "recurrent": ((batch, *variables, self.num_heads, self.head_dim), torch.float32),
            "conv": ((batch, self.options.conv_width - 1, self.inner), torch.bfloat16),
        }

    def operator_flops(self, length: int) -> float:
        """B, the convolution, and one step of the cell: a multiply-add for each recurrent weight
        and about three for what becomes of the gates. Iterations repeat the step and are not
        counted: they are what a parallel form costs on top."""
        mix = 2 * GATES * self.head_dim
        step = 2 * (len(CELLS[self.cell].weights) + 3)
        return float(self.inner * (mix + 2 * self.options.conv_width + step))


@MIXERS.register("para_gru")
class ParaGRU(ParaRNN):
    """z = σ(g_z + a_z h), r = σ(g_r + a_r h), n = tanh(g_n + a_n h r), h' = (1 - z) h + z n,
    channel by channel; see `ParaRNN`."""

    cell, keeping = "para_gru", -1


@MIXERS.register("para_lstm")
class ParaLSTM(ParaRNN):
    """f = σ(g_f + a_f h + c_f c), z = tanh(g_z + a_z h), c' = f c + (1 - f) z,
    o = σ(g_o + a_o h + c_o c'), h' = o tanh(c'), channel by channel; see `ParaRNN`."""

    cell, keeping = "para_lstm", 1
