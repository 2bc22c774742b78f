"""One layer: a sequence mixer and a channel mixer, each behind a norm and a residual."""

from __future__ import annotations

from torch import Tensor, nn

from rondo.models.config import LayerSpec, ModelConfig, make_options
from rondo.models.layers import RMSNorm
from rondo.models.mixer import ChannelMixer, Cost, SequenceContext, State, module_cost
from rondo.models.registry import FFNS, MIXERS


class Block(nn.Module):
    """`x + mixer(norm(x))`, then `x + ffn(norm(x))` unless the layer has no channel mixer."""

    def __init__(self, config: ModelConfig, spec: LayerSpec, layer: int) -> None:
        super().__init__()
        self.mixer_norm = RMSNorm(config.dim, config)
        self.mixer = MIXERS[spec.mixer](config, make_options(spec.mixer, spec.options), layer)
        self.ffn_norm: RMSNorm | None = None
        self.ffn: ChannelMixer | None = None
        if spec.ffn != "none":
            self.ffn_norm = RMSNorm(config.dim, config)
            self.ffn = FFNS[spec.ffn](config)

        kind = None if spec.ffn == "none" else FFNS[spec.ffn]
        self.carried = () if kind is None else tuple(kind.carried(config))
        self.shares = kind is not None and bool(kind.shared_modules(config))

    def forward(
        self,
        x: Tensor,
        carry: dict[str, Tensor],
        ctx: SequenceContext,
        state: State | None = None,
    ) -> tuple[Tensor, dict[str, Tensor], State | None]:
        """`x` `(B, T, dim)`; returns the new `x`, what crosses layers beside it
        (`ChannelMixer.carried`), and, if wanted, the mixer's state after it."""
        y, state = self.mixer(self.mixer_norm(x), ctx, state)
        x = x + y
        if self.ffn is not None and self.ffn_norm is not None:
            if self.carried or self.shares:
                shared = (ctx.shared,) if self.shares else ()
                y, carry = self.ffn(self.ffn_norm(x), carry, *shared)
            else:
                y = self.ffn(self.ffn_norm(x))
            x = x + y
        return x, carry, state if ctx.keep_state else None

    def cost(self, length: int) -> Cost:
        """Cost in sequences of `length` tokens."""
        cost = self.mixer.cost(length) + module_cost(self.mixer_norm)
        if self.ffn is not None and self.ffn_norm is not None:
            cost = cost + self.ffn.cost(length) + module_cost(self.ffn_norm)
        return cost
