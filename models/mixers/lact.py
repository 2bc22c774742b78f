"""Large-chunk test-time training beside a sliding window: the LaCT block."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rondo.kernels import FastWeights, FastWeightState, attention, fast_weights, l2_norm
from rondo.kernels.fast_weights import fast_weight_state_shapes
from rondo.kernels.rope import rope_table, rotate
from rondo.models import kv_cache
from rondo.models.config import ModelConfig
from rondo.models.init import constant, normal, parameter
from rondo.models.layers import Linear, RMSNorm, at_least_float32
from rondo.models.mixer import Mixer, SequenceContext, State, get, split_heads
from rondo.models.registry import MIXERS

UPDATES = ("muon", "gradient")
FIRST_RATE = 1e-3
"""Learning rate of a token in a fresh model."""


@dataclass
class LaCTOptions:
    """Hyper-parameters of `lact`."""

    num_heads: int | None = None
    """Heads of the attention; None: dim / 64, at least 1."""
    num_fast_heads: int = 4
    """Heads of the fast weights, each a network of its own, dim / num_fast_heads wide."""
    expansion: float = 1.0
    """Width of a network's hidden layer over that of its head."""
    chunk_size: int = 2048
    """Tokens of a step of training. Part of the model: another size is another model, and a state
    does not go from one to the other."""
    window: int | None = None
    """Keys that a query of the attention sees, itself included; None: chunk_size, so that it
    covers the chunk that the fast weights have not learned yet."""
    update: str = "muon"
    """Step of the fast weights: "muon", orthogonalised, or "gradient"."""
    momentum: bool = True
    """Momentum of the fast weights, learned for each token."""
    qk_norm: bool = True
    """RMSNorm of the attention's queries and keys, per head, before RoPE."""
    rope_theta: float = 1000000.0
    """Base of the rotary frequencies of the attention (positions restart with each document)."""
    init_rank: int = 32
    """Rank of the random part of the initial gate and up matrices."""


@MIXERS.register("lact")
class LaCT(Mixer):
    """The block of LaCT (arXiv 2505.23884): `kernels.attention` in a window for what is near, and
    `kernels.fast_weights` for all before, on one q, k and v. Of the fast branch, with n over
    width, a head of width D, and rates η of gate, up and down,

        q', k' = n₂(SiLU(s · [q, k] + o))    v' = SiLU(v)    η = softplus(W_η x + b_η)
        β = σ(W_β x)                         o' = RMSNorm(fast_weights(q', k', v', η, β))
        y = W_O (attention(q, k, v) + SiLU(w_s · x) o')

    where n₂ gives unit norm per head, s = 1 and o = 0 per channel and η = 0.001 at the start. W_β
    is left out without `momentum`. The fast branch has no positions. A token reads what the chunks
    before its own have taught the weights, so the layer is causal.

    State: that of the fast weights, `weights`, `gradient`, `momentum_buffer` `(B, H, F, 3 D)` and
    `momentum_sum` `(B, H)` float32 and `count` `(B,)` as in `FastWeightState`, and the attention's
    `k`, `v` `(B, window - 1, heads, width)` and `live` as in `kv_cache`.
    """

    Options = LaCTOptions
    sharding: ClassVar = {
        **{f"{name}_proj": "column" for name in ("q", "k", "v", "rate", "momentum", "scale")},
        **{f"{name}_norm": "replicate" for name in ("q", "k", "fast")},
        **{f"{name}_{part}": "head" for name in ("q", "k") for part in ("scale", "offset")},
        "rate_bias": "head",
        "fast": "head",
        "o_proj": "row",
    }
    float32_parameters: ClassVar = ("rate_bias",)

    def __init__(self, config: ModelConfig, options: LaCTOptions, layer: int) -> None:
        super().__init__(config, options, layer)
        self.num_heads, self.window = _sizes(config, options)
        self.head_dim = config.dim // self.num_heads
        self.fast_dim = config.dim // options.num_fast_heads
        self.scan = fast_weights
        self.attend: Callable[..., Any] = attention
        dim, heads, std = config.dim, options.num_fast_heads, config.init_std
        self.q_proj = Linear(dim, dim, std=std)
        self.k_proj = Linear(dim, dim, std=std)
        self.v_proj = Linear(dim, dim, std=std)
        if options.qk_norm:
            self.q_norm = RMSNorm(self.head_dim, config)
            self.k_norm = RMSNorm(self.head_dim, config)
        for name in ("q", "k"):
            setattr(self, f"{name}_scale", parameter((dim,), constant(1.0)))
            setattr(self, f"{name}_offset", parameter((dim,), constant(0.0)))
        self.rate_proj = Linear(dim, 3 * heads, std=std)  # three of a head side by side
        self.rate_bias = parameter((3 * heads,), constant(math.log(math.expm1(FIRST_RATE))))
        if options.momentum:
            self.momentum_proj = Linear(dim, heads, std=std)
        self.fast = InitialWeights(heads, self.fast_dim, options)
        self.fast_norm = RMSNorm(self.fast_dim, config)
        self.scale_proj = Linear(dim, heads, std=std)
        self.o_proj = Linear(dim, dim, std=config.residual_std)

    @classmethod
    def problems(cls, config: ModelConfig, options: LaCTOptions) -> list[str]:
        heads, _ = _sizes(config, options)
        found = []
        for name, count in (("num_heads", heads), ("num_fast_heads", options.num_fast_heads)):
            if config.dim % count:
                found.append(f"{name}: {count} heads do not divide model.dim {config.dim}")
        if not found and config.dim // heads % 2:
            found.append(f"num_heads: RoPE needs heads of even width, got {config.dim // heads}")
        if not found and _hidden(config.dim // options.num_fast_heads, options) < 1:
            found.append(f"expansion: leaves no hidden layer, got {options.expansion}")
        if options.update not in UPDATES:
            found.append(f"update: must be {' or '.join(UPDATES)}, got {options.update!r}")
        return found

    @classmethod
    def heads(cls, config: ModelConfig, options: LaCTOptions) -> dict[str, int]:
        return {
            "num_heads": _sizes(config, options)[0],
            "num_fast_heads": options.num_fast_heads,
        }

    def forward(
        self, x: Tensor, ctx: SequenceContext, state: State | None = None
    ) -> tuple[Tensor, State]:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        near, cache = self._attention(q, k, v, ctx, state)
        learned, after = self._fast_weights(x, q, k, v, ctx, state)
        return self.o_proj(near + learned), {**cache, **after}

    def _attention(
        self, q: Tensor, k: Tensor, v: Tensor, ctx: SequenceContext, state: State | None
    ) -> tuple[Tensor, State]:
        """`(B, T, dim)` and the cache."""
        q, k, v = (split_heads(x, self.head_dim) for x in (q, k, v))
        if self.options.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        kind = torch.promote_types(q.dtype, torch.float32)
        theta = self.options.rope_theta
        table = rope_table(ctx.positions, self.head_dim, theta=theta, dtype=kind)
        q, k = rotate(q, *table), rotate(k, *table)
        cache, ids, key_ids = kv_cache.extend(state, k, v, ctx.segment_ids)
        o = self.attend(
            q,
            cache["k"],
            cache["v"],
            window=self.window,
            segment_ids=ids,
            key_segment_ids=key_ids,
        )
        return o.flatten(2), kv_cache.trim(cache, self.window)

    def _fast_weights(
        self,
        x: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        ctx: SequenceContext,
        state: State | None,
    ) -> tuple[Tensor, State]:
        """`(B, T, dim)` and the state of the fast weights."""
        options, momentum = self.options, None
        rates = F.softplus(at_least_float32(self.rate_proj(x)) + self.rate_bias)
        if options.momentum:
            momentum = at_least_float32(self.momentum_proj(x)).sigmoid()
        before = None
        if state is not None:
            before = FastWeightState._make(get(state, name) for name in FastWeightState._fields)
        o, after = self.scan(
            l2_norm(self._unit_input("q", q)),
            l2_norm(self._unit_input("k", k)),
            split_heads(F.silu(v), self.fast_dim),
            rates.unflatten(-1, (-1, 3)),
            self.fast(),
            momentum=momentum,
            update=options.update,
            order="apply_then_update",
            initial_state=before,
            segment_ids=ctx.segment_ids,
            chunk_size=options.chunk_size,
        )
        o = self.fast_norm(o) * F.silu(self.scale_proj(x)).unsqueeze(-1)
        return o.flatten(2), {n: value for n, value in after._asdict().items() if value is not None}

    def _unit_input(self, name: str, x: Tensor) -> Tensor:
        scale, offset = getattr(self, f"{name}_scale"), getattr(self, f"{name}_offset")
        return split_heads(F.silu(x * scale.to(x.dtype) + offset.to(x.dtype)), self.fast_dim)

    def state_shapes(
        self, batch: int, length: int
    ) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        cache = (batch, min(length, self.window - 1), self.num_heads, self.head_dim)
        width, options = self.fast_dim, self.options
        hidden = _hidden(width, options)
        return {
            "k": (cache, torch.bfloat16),
            "v": (cache, torch.bfloat16),
            **fast_weight_state_shapes(
                batch, options.num_fast_heads, width, width, hidden, momentum=options.momentum
            ),
        }

    def operator_flops(self, length: int) -> float:
        window = min(self.window, length)
        seen = window - window * (window - 1) / (2 * length)  # mean number of keys a query sees
        width, options = self.fast_dim, self.options
        hidden = _hidden(width, options)
        fast = 18.0 * width * hidden  # three matrices: 6 in sums of gradients, 6 in reads
        if options.update == "muon":
            small, large = sorted((width, hidden))
            step = 3 * (20 * small**2 * large + 10 * small**3)
            fast += step * (length // options.chunk_size) / length
        return 4.0 * seen * self.config.dim + options.num_fast_heads * fast


class InitialWeights(nn.Module):
    """The weights that every document begins with: gate and up are `left right + 0.5 I`, normal
    with `left` and `right` of standard deviations 0.5 / sqrt(rank) and 0.5 / sqrt(width), and down
    normal with 1 / sqrt(hidden)."""

    def __init__(self, heads: int, width: int, options: LaCTOptions) -> None:
        super().__init__()
        rank, hidden = options.init_rank, _hidden(width, options)
        for name in ("gate", "up"):
            left = parameter((heads, hidden, rank), normal(0.5 * rank**-0.5))
            right = parameter((heads, rank, width), normal(0.5 * width**-0.5))
            self.register_parameter(f"{name}_left", left)
            self.register_parameter(f"{name}_right", right)
        self.down = parameter((heads, width, hidden), normal(hidden**-0.5))

    def forward(self) -> FastWeights:
        """Matrices `(heads, F, D)`, `(heads, F, D)`, `(heads, D, F)`, at least float32."""
        return FastWeights(self._input("gate"), self._input("up"), at_least_float32(self.down))

    def _input(self, name: str) -> Tensor:
        parts = (getattr(self, f"{name}_{part}") for part in ("left", "right"))
        left, right = map(at_least_float32, parts)
        eye = torch.eye(left.shape[1], right.shape[2], dtype=left.dtype, device=left.device)
        return torch.baddbmm(eye, left, right, beta=0.5)


def _sizes(config: ModelConfig, options: LaCTOptions) -> tuple[int, int]:
    heads = options.num_heads or max(1, config.dim // 64)
    return heads, options.chunk_size if options.window is None else options.window


def _hidden(width: int, options: LaCTOptions) -> int:
    return int(width * options.expansion)
