"""LSTM, GRU, Elman and sLSTM layers: gates see the whole state of their head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from rondo.kernels import nonlinear_rnn, rms_norm, short_conv
from rondo.kernels.linear import linear
from rondo.kernels.nonlinear_rnn import CELLS, lstm_library
from rondo.models.config import ModelConfig
from rondo.models.init import Initializer, constant, normal, parameter
from rondo.models.layers import Linear, ShortConv
from rondo.models.mixer import Mixer, SequenceContext, State, get, split_heads
from rondo.models.registry import MIXERS


@dataclass
class RNNOptions:
    """Hyper-parameters of `lstm`, `gru`, `elman` and `slstm`."""

    num_heads: int = 4
    """Heads, which know nothing of each other within the layer."""
    conv_width: int = 4
    """Taps of the short convolution in front of the gates that decide what is kept."""
    output_projection: bool = True
    """Mix the heads' outputs; the blocks of xLSTM leave that to the channel mixer."""
    gradient_recurrent_cut: bool = False
    """Take h for a constant where it is multiplied by R: gradients go back in time through the
    cell's other states alone."""


def _products(y: Tensor, weight: Tensor) -> Tensor:
    """`(B, T, G, H, D)`: each head of `y` `(B, T, H, D)` times its own matrices of `weight`
    `(H, G, D, D)`."""
    heads, gates, dim, _ = weight.shape
    if heads == 1:
        return linear(y[:, :, 0], weight[0].flatten(0, 1)).unflatten(2, (gates, 1, dim))
    return torch.einsum("bthi,hgoi->btgho", y, weight)


class HeadwiseRNN(Mixer):
    """The sLSTM block of xLSTM (arXiv 2405.04517) around a cell of `kernels.nonlinear_rnn`, as
    FlashRNN (arXiv 2412.07752) uses it for all of them: with u = SiLU(conv(x)), head by head,

        gates = (W u for the first `convolved` of them, W x for the others) + b
        h = cell(gates, R h)      y = W_o (norm(h))

    The norm is an RMSNorm a head (the paper's a GroupNorm). W begins N(0, 2 / (5 width)), R, which
    the paper begins with zeros, N(0, init_std²).

    State: `recurrent` `(B, S, H, D)` float32, h first, and the last inputs of the convolution,
    `conv` `(B, conv_width - 1, dim)`.
    """

    Options: ClassVar[type] = RNNOptions
    state_heads: ClassVar[int] = -2
    cell: ClassVar[str]
    """Name of the kernel's cell."""
    convolved: ClassVar[int] = 2
    """Gates, from the first one on, that see the convolved input."""
    sharding = {  # noqa: RUF012  (of one part; the rest depends on the options)
        "x_conv": "head",
        "weight": "head",
        "recurrent": "head",
        "bias": "head",
        "norm": "head",
    }
    float32_parameters: ClassVar[tuple[str, ...]] = ("recurrent", "bias")

    def __init__(self, config: ModelConfig, options: RNNOptions, layer: int) -> None:
        super().__init__(config, options, layer)
        self.head_dim = config.dim // options.num_heads
        self.scan, self.conv = nonlinear_rnn, short_conv
        heads, width, cell = options.num_heads, self.head_dim, CELLS[self.cell]
        square = (heads, len(cell.gates), width, width)
        self.x_conv = ShortConv(config.dim, options.conv_width, bias=True)
        self.weight = parameter(square, normal((2 / (5 * width)) ** 0.5))
        self.recurrent = parameter(square, normal(config.init_std))
        self.bias = parameter((heads, len(cell.biases), width), self.initial_bias())
        self.norm = parameter((heads, width), constant(1.0))
        self.o_proj: Linear | None = None
        if options.output_projection:
            self.o_proj = Linear(config.dim, config.dim, std=config.residual_std)
            self.sharding = {**self.sharding, "o_proj": "row"}
        else:
            self.sharding = {**self.sharding, "output": "row"}

    def initial_bias(self) -> Initializer:
        """Of `bias` `(heads, biases, width)`."""
        return constant(0.0)

    @classmethod
    def problems(cls, config: ModelConfig, options: RNNOptions) -> list[str]:
        if config.dim % options.num_heads:
            return [f"num_heads: dim {config.dim} is not divisible by {options.num_heads}"]
        return []

    @classmethod
    def heads(cls, config: ModelConfig, options: RNNOptions) -> dict[str, int]:
        return {"num_heads": options.num_heads}

    def forward(
        self, x: Tensor, ctx: SequenceContext, state: State | None = None
    ) -> tuple[Tensor, State]:
        after: State = {}
        start, width = self.first_head * self.head_dim, len(self.weight) * self.head_dim
        own = x[..., start : start + width]
        u, after["conv"] = self.x_conv(
            own,
            self.conv,
            initial_state=get(state, "conv"),
            segment_ids=ctx.segment_ids,
        )
        h, after["recurrent"] = self.run(
            split_heads(u, self.head_dim),
            split_heads(own, self.head_dim),
            get(state, "recurrent"),
            ctx.segment_ids,
        )
        y = rms_norm(h, eps=self.config.norm_eps) * self.norm.to(h.dtype)
        if self.o_proj is not None:
            return self.o_proj(y.flatten(2)), after
        return F.pad(y.flatten(2), (start, x.shape[-1] - start - width)), after

    def run(
        self, u: Tensor, x: Tensor, state: Tensor | None, segment_ids: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """h `(B, T, H, D)` and the state after it, from convolved and plain inputs `(B, T, H, D)`
        and the state before them."""
        return self.scan(
            self.cell,
            self.gates(u, x),
            self.recurrent.transpose(0, 1),
            bias=self.bias.transpose(0, 1),
            initial_state=state,
            segment_ids=segment_ids,
            gradient_recurrent_cut=self.options.gradient_recurrent_cut,
        )

    def gates(self, u: Tensor, x: Tensor) -> Tensor:
        """What the inputs contribute `(B, T, G, H, D)`, from convolved and plain ones
        `(B, T, H, D)`."""
        weight = self.weight.to(x.dtype)
        each = ((u, weight[:, : self.convolved]), (x, weight[:, self.convolved :]))
        return torch.cat([_products(y, w) for y, w in each if w.shape[1]], 2)

    def state_shapes(
        self, batch: int, length: int
    ) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        heads, states = self.options.num_heads, len(CELLS[self.cell].states)
        return {
            "recurrent": ((batch, states, heads, self.head_dim), torch.float32),
            "conv": ((batch, self.options.conv_width - 1, self.config.dim), torch.bfloat16),
        }

    def operator_flops(self, length: int) -> float:
        """Two matrices a gate and head, one for the inputs and one for the state."""
        gates = 4 * len(CELLS[self.cell].gates) * self.head_dim
        return float(self.config.dim * (gates + 2 * self.options.conv_width))


class ForgetGate(HeadwiseRNN):
    """A layer whose forget gate begins at `5 - 12 (j / (D - 1))^(0.3 + 1.3 ρ)` for channel j of a
    head and ρ the layer's share of the depth: memories of many lengths, longer ones further up."""

    def initial_bias(self) -> Initializer:
        depth = self.layer / max(self.config.num_layers - 1, 1)
        channels = torch.linspace(0, 1, self.head_dim, device="cpu")
        forget = 5 - 12 * channels ** (0.3 + 1.3 * depth)

        def fill(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
            bias = torch.zeros(shape)
            bias[:, CELLS[self.cell].biases.index("f")] = forget
            return bias

        return fill


@MIXERS.register("lstm")
class LSTM(ForgetGate):
    """c' = σ(f) c + σ(i) tanh(z), h' = σ(o) tanh(c'); see `HeadwiseRNN`. On a CPU heads run
    by torch's own layer where that serves (`lstm_library.py`)."""

    cell = "lstm"
    exact = False  # where torch's layer is called again depends on all rows

    def run(
        self, u: Tensor, x: Tensor, state: Tensor | None, segment_ids: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        alone = self.scan is nonlinear_rnn and not self.options.gradient_recurrent_cut
        if not (alone and lstm_library.served(x, segment_ids)):
            return super().run(u, x, state, segment_ids)
        # Each gate reads both inputs, by zeros that of other gates.
        convolved, plain = self.weight.split((self.convolved, 4 - self.convolved), 1)
        width = self.head_dim
        weight = torch.cat((F.pad(convolved, (0, width)), F.pad(plain, (width, 0))), 1)
        both = torch.cat((u, x), -1)
        return lstm_library.lstm(both, weight, self.recurrent, self.bias, state, segment_ids)


@MIXERS.register("gru")
class GRU(HeadwiseRNN):
    """h' = σ(z) h + (1 - σ(z)) tanh(n + σ(r) R h); see `HeadwiseRNN`."""

    cell = "gru"


@MIXERS.register("elman")
class Elman(HeadwiseRNN):
    """h' = tanh(n); see `HeadwiseRNN`."""

    cell = "elman"
    convolved = 1


@MIXERS.register("slstm")
class SLSTM(ForgetGate):
    """c' = f c + i tanh(z), n' = f n + i, h' = σ(o) c' / n', with i exponential; see
    `HeadwiseRNN`."""

    cell = "slstm"
