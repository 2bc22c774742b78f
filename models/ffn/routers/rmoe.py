"""`rmoe`: a cell that recurs over depth; `xmoe_gru`: the same before the scores of `xmoe`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from rondo.models.config import ModelConfig
from rondo.models.ffn.cells import GATES, STATES, SharedCell, step
from rondo.models.ffn.router import Carry, CosineScores, Projection, Router, project
from rondo.models.layers import Linear
from rondo.models.registry import ROUTERS

STATE, SCORES = "router_state", "router_scores"
PASSING = ("gradient", "detach", "none")


@dataclass
class RMoEOptions:
    """Hyper-parameters of `rmoe`."""

    dim: int = 128
    """Width of the state."""
    cell: str = "gru"
    """'gru', 'lstm' or 'rnn'; all layers share its weights."""
    shared_projection: bool = False
    """One projection into the cell for all layers, instead of one each."""
    passing: str = "gradient"
    """What the next router gets: the state with its gradient, 'detach' for the state alone, or
    'none' (each layer starts from zero)."""
    alpha: float = field(default=0.0, metadata={"zero": True})
    """Adds so much of the scores of the router below to a router's own."""
    detach_scores: bool = False
    """Without the gradient of those scores; needs `alpha`."""


@ROUTERS.register("rmoe")
class RMoERouter(Router):
    """The layerwise recurrent router (arXiv 2408.06793), for each token and mixture i = 1..L:

        h_i = cell(P_i x_i, h_{i-1}),  h_0 = 0,  a_i = G_i h_i

    The cell is `torch.nn.GRUCell`'s (or LSTMCell's, RNNCell's). P_i and G_i are the layer's own.
    With alpha, the scores are `a_i + alpha a_{i-1}`.
    """

    Options: ClassVar[type] = RMoEOptions

    def __init__(self, config: ModelConfig, options: Any, experts: int) -> None:
        super().__init__(config, options, experts)
        self.proj: Projection | None = None
        if not options.shared_projection:
            self.proj = Projection(config.dim, options.dim, std=config.dim**-0.5)
        self.projection_flops = 2.0 * config.dim * options.dim
        self.scores = self.make_scores(config, options, experts)

    def make_scores(self, config: ModelConfig, options: Any, experts: int) -> nn.Module:
        """From the cell's output to logits."""
        return Linear(options.dim, experts, std=options.dim**-0.5)

    @classmethod
    def problems(cls, options: Any) -> list[str]:
        found = [
            f"{key}: must be one of {', '.join(known)}, got {getattr(options, key)!r}"
            for key, known in (("cell", GATES), ("passing", PASSING))
            if getattr(options, key) not in known
        ]
        if options.detach_scores and not options.alpha:
            found.append(
                "detach_scores: with alpha 0 no scores are handed up; set alpha (the paper's: 0.5 "
                "or 1), or leave it false"
            )
        return found

    @classmethod
    def carried(cls, config: ModelConfig, options: Any, experts: int) -> dict[str, int]:
        widths = {}
        if options.passing != "none":
            widths[STATE] = STATES[options.cell] * options.dim
        if options.alpha:
            widths[SCORES] = experts
        return widths

    @classmethod
    def shared_modules(cls, config: ModelConfig, options: Any) -> dict[str, nn.Module]:
        cell = SharedCell(
            options.cell,
            options.dim,
            dim=config.dim,
            std=config.dim**-0.5,
            projects=options.shared_projection,
        )
        return {"router": cell}

    def forward(self, x: Tensor, carry: Carry, shared: dict[str, Any]) -> tuple[Tensor, Carry]:
        if "router" not in shared:
            raise ValueError(
                "the cell that all layers share is missing: pass shared={'router': cell()} with "
                f"the cell of shared_modules, as Decoder does; got {sorted(shared)}"
            )
        options, weights = self.options, shared["router"]
        inputs = project(x, weights.projection) if self.proj is None else self.proj(x)
        before = carry.get(STATE)
        if before is None:
            before = inputs.new_zeros(*x.shape[:2], STATES[options.cell] * options.dim)
        if options.passing == "detach":
            before = before.detach()
        flat = (inputs.flatten(0, 1), before.flatten(0, 1))
        state = step(options.cell, *flat, weights, gradients=x.dtype).view(before.shape)
        alone = STATES[options.cell] == 1  # the gradient of a slice costs passes over memory
        own = self.scores(state if alone else state[..., : options.dim])
        below, after = carry.get(SCORES), {STATE: state, SCORES: own}
        carry = {name: after.get(name, value) for name, value in carry.items()}
        if below is None:
            return own, carry
        return own + options.alpha * (below.detach() if options.detach_scores else below), carry

    def flops(self) -> float:
        cell = 4.0 * GATES[self.options.cell] * self.options.dim**2
        shared = self.projection_flops if self.proj is None else 0.0
        return super().flops() + cell + shared


@dataclass
class XMoEGRUOptions(RMoEOptions):
    """Hyper-parameters of `xmoe_gru`."""

    dim: int = 16
    """Width of the projection and of the state."""
    temperature: float = 0.3
    """The learned temperature's initial value."""


@ROUTERS.register("xmoe_gru")
class XMoEGRURouter(RMoERouter):
    """`a_e = cos(h_i, E_e) / τ`: the scores of `xmoe`, with a cell before them."""

    Options: ClassVar[type] = XMoEGRUOptions

    def make_scores(self, config: ModelConfig, options: Any, experts: int) -> nn.Module:
        return CosineScores(
            options.dim, experts, std=config.init_std, temperature=options.temperature
        )

    def flops(self) -> float:
        return super().flops() + 2 * self.scores.get_parameter("weight").numel()
