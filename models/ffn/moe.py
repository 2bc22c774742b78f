"""Mixture of experts: a router sends each token to a few of many SwiGLUs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rondo.kernels import swiglu
from rondo.models.config import ModelConfig, read_options
from rondo.models.ffn.dispatch import (
    Choice,
    choose,
    count_by_row,
    over_capacity,
    whole_sequence,
)
from rondo.models.ffn.experts import Experts
from rondo.models.ffn.router import Carry
from rondo.models.layers import Linear
from rondo.models.mixer import ChannelMixer, Cost, module_cost
from rondo.models.registry import FFNS, ROUTERS

NAME, BALANCE, Z = "moe", "balance_loss", "z_loss"


@dataclass
class MoEOptions:
    """Hyper-parameters of `moe`."""

    num_experts: int = 16
    """Experts that are routed to."""
    top_k: int = 2
    """Experts a token goes to."""
    expert_dim: int | None = None
    """Inner width of an expert; None: the channel mixer's inner width over top_k, so that a token
    costs what a dense layer costs."""
    router: str = "rmoe"
    """A router; its options are in model.routers."""
    renormalize: bool = True
    """Make the weights of a token's experts sum to 1."""
    shared_experts: int = field(default=0, metadata={"zero": True})
    """Experts that every token goes to besides."""
    routed_weight: float = 0.5
    """Weight of the routed experts' sum where there are shared experts."""
    shared_weight: float = 0.5
    """Weight of the shared experts' sum."""
    capacity_factor: float | None = None
    """An expert takes at most so many times its even share of a sequence's choices, those of
    highest probability; the others get nothing from it. None: all it is sent."""
    balance_loss: float = field(default=0.01, metadata={"zero": True})
    """Coefficient of the load-balance loss."""
    z_loss: float = field(default=0.0, metadata={"zero": True})
    """Coefficient of the mean squared log-sum-exp of the logits."""
    bias_rate: float = field(default=0.0, metadata={"zero": True})
    """Balances without a loss (set `balance_loss` to 0 then): after a step, each expert's bias in
    the choice moves by so much towards an even load (arXiv 2408.15664)."""
    freeze_router: bool = False
    """Keep the routers as they are, what layers share of them and biases in the choice included."""


@FFNS.register(NAME)
class MoE(ChannelMixer):
    """`y = Σ_{e in S} w_e E_e(x)`, with S the k experts of highest `g = softmax(router(x))` and w
    their g, renormalised (arXiv 2101.03961, 2408.06793). Softmax before selection, in float32.

    Auxiliary losses are means over tokens and mixtures, carried up as what each token adds:
    load balance `N Σ_e f_e g_e`, with f_e the choices of expert e over the tokens of the token's
    sequence (k when all are even), and `logsumexp(logits)²`. Given f they are linear in tokens,
    so that micro-batches and ranks do not change them.
    """

    Options: ClassVar[type] = MoEOptions
    sharding: ClassVar = {
        "router": "replicate",
        **{f"experts.{name}": word for name, word in Experts.sharding.items()},
        "shared_gate": "column",
        "shared_up": "column",
        "shared_down": "row",
    }
    float32_parameters: ClassVar = ("balance_bias",)
    """Never cast to a lower precision, whose steps could be larger than `bias_rate`."""
    optional_tensors: ClassVar = ("balance_bias",)
    """There with `bias_rate` only (`Decoder.optional_names`)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.options = options = moe_options(config)
        inner = _expert_dim(config, options)
        self.layers = len(mixture_layers(config))
        self.router = ROUTERS[options.router](
            config, _router_options(config, options), options.num_experts
        )
        self.experts = Experts(
            options.num_experts,
            config.dim,
            inner,
            std=config.init_std,
            residual_std=config.residual_std,
        )
        if width := options.shared_experts * inner:
            self.shared_gate = Linear(config.dim, width, std=config.init_std)
            self.shared_up = Linear(config.dim, width, std=config.init_std)
            self.shared_down = Linear(width, config.dim, std=config.residual_std)
        if options.freeze_router:
            self.router.requires_grad_(False)
        self.total: Callable[[Tensor], Tensor] = whole_sequence
        self.drop: Callable[[Choice, int, float], Tensor] = over_capacity
        self.balance_bias: Tensor | None
        bias = torch.zeros(options.num_experts) if options.bias_rate else None
        self.register_buffer("balance_bias", bias)
        self.load: Tensor
        # Choices of each expert in training since it was last set to zero, and dropped ones.
        load = torch.zeros(options.num_experts + 1, dtype=torch.int64)
        self.register_buffer("load", load, persistent=False)

    @classmethod
    def carried(cls, config: ModelConfig) -> dict[str, int]:
        options = moe_options(config)
        router = ROUTERS[options.router]
        state = router.carried(config, _router_options(config, options), options.num_experts)
        return {**state, **dict.fromkeys(cls.losses(config), 1)}

    @classmethod
    def losses(cls, config: ModelConfig) -> dict[str, float]:
        options = moe_options(config)
        weights = {BALANCE: options.balance_loss, Z: options.z_loss}
        return {name: weight for name, weight in weights.items() if weight}

    @classmethod
    def shared_modules(cls, config: ModelConfig) -> dict[str, nn.Module]:
        options = moe_options(config)
        shared = ROUTERS[options.router].shared_modules(config, _router_options(config, options))
        for module in shared.values():
            module.requires_grad_(not options.freeze_router)
        return shared

    @classmethod
    def splits(cls, config: ModelConfig) -> dict[str, int]:
        options = moe_options(config)
        key = "ffn_dim" if options.expert_dim is None else f"ffns.{NAME}.expert_dim"
        return {key: _expert_dim(config, options)}

    @classmethod
    def expert_counts(cls, config: ModelConfig) -> dict[str, int]:
        return {f"ffns.{NAME}.num_experts": moe_options(config).num_experts}

    @classmethod
    def problems(cls, config: ModelConfig) -> list[str]:
        place, options = f"model.ffns.{NAME}", moe_options(config)
        if options.router not in ROUTERS:
            return [f"{place}.router: {ROUTERS.unknown(options.router)}"]
        found = ROUTERS[options.router].problems(_router_options(config, options))
        found = [f"model.routers.{options.router}.{reason}" for reason in found]
        if options.top_k == 1 < options.num_experts and options.renormalize:
            found.append(
                f"{place}.renormalize: must be false with top_k 1, where a renormalised weight is "
                "always 1 and teaches the router nothing"
            )
        if options.top_k > options.num_experts:
            found.append(
                f"{place}.top_k: {options.top_k} experts a token, but {place}.num_experts is "
                f"{options.num_experts}"
            )
        return found

    def forward(
        self, x: Tensor, carry: Carry | None = None, shared: dict[str, Any] | None = None
    ) -> Tensor | tuple[Tensor, Carry]:
        """`y` `(B, T, dim)` of `x`; and, where there is a `carry`, what is handed on of it. Without
        one, the router starts as in the first mixture. `shared` is what each of `shared_modules`
        returns, by name. Raises ValueError where the router needs one that is not in it."""
        logits, after = self.router(x, carry or {}, shared or {})
        probabilities = logits.softmax(-1)
        choice = choose(
            probabilities,
            self.options.top_k,
            renormalize=self.options.renormalize,
            bias=self.balance_bias,
        )
        counts = count_by_row(choice.experts, self.options.num_experts)
        after = self._add_losses(after, logits, probabilities, counts)
        y = self._routed(x, choice, counts)
        if self.options.shared_experts:
            alike = self.shared_down(swiglu(self.shared_gate(x), self.shared_up(x)))
            y = self.options.routed_weight * y + self.options.shared_weight * alike
        return y if carry is None else (y, after)

    def _routed(self, x: Tensor, choice: Choice, counts: Tensor) -> Tensor:
        count, factor = self.options.num_experts, self.options.capacity_factor
        experts, lost = choice.experts, counts.new_zeros(1)
        if factor is not None:
            dropped = self.drop(choice, count, factor)
            experts, lost = experts.masked_fill(dropped, count), dropped.sum()[None]
        if self.training:
            self.load += torch.cat((counts.sum(0), lost))
        flat = (each.flatten(0, 1) for each in (x, experts, choice.weights))
        return self.experts(*flat, drops=factor is not None).view_as(x)

    def _add_losses(
        self, carry: Carry, logits: Tensor, probabilities: Tensor, counts: Tensor
    ) -> Carry:
        """What each token adds to the auxiliary losses that are carried."""
        added: Carry = {}
        if BALANCE in carry:
            total = self.total(counts).to(probabilities.dtype)
            tokens = total.sum(1, keepdim=True) / self.options.top_k
            shares = self.options.num_experts / tokens * total
            added[BALANCE] = (probabilities * shares[:, None]).sum(-1, keepdim=True)
        if Z in carry:
            added[Z] = logits.logsumexp(-1, keepdim=True).square()
        return carry | {name: carry[name] + value / self.layers for name, value in added.items()}

    def idle_parameters(self) -> int:
        """Parameters of the routed experts that a token does not go to."""
        experts = sum(weight.numel() for weight in self.experts.parameters())
        return experts // self.options.num_experts * (self.options.num_experts - self.options.top_k)

    def cost(self, length: int) -> Cost:
        experts = sum(weight.numel() for weight in self.experts.parameters())
        routed = 2.0 * (experts - self.idle_parameters())
        always = module_cost(self).flops - module_cost(self.router).flops + self.router.flops()
        return Cost(always + routed, module_cost(self).parameters, 0)


def moe_options(config: ModelConfig) -> MoEOptions:
    """The options of `moe` in `config`. Raises UserError on an impossible one."""
    return read_options(MoEOptions, config.ffns.get(NAME, {}), f"model.ffns.{NAME}")


def mixture_layers(config: ModelConfig) -> list[int]:
    """The layers of `config` that have a mixture."""
    kinds = [None if spec.ffn == "none" else FFNS[spec.ffn] for spec in config.layers()]
    return [i for i, kind in enumerate(kinds) if kind is not None and issubclass(kind, MoE)]


def _router_options(config: ModelConfig, options: MoEOptions) -> Any:
    values = config.routers.get(options.router, {})
    return read_options(ROUTERS[options.router].Options, values, f"model.routers.{options.router}")


def _expert_dim(config: ModelConfig, options: MoEOptions) -> int:
    return options.expert_dim or max(1, config.inner_dim // options.top_k)
