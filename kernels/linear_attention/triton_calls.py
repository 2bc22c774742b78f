"""Launches the Triton kernels of gated linear attention on contiguous tensors."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from rondo.kernels.linear_attention.triton_outputs import (
    gradients_kernel,
    mix_kernel,
    score_gradients_kernel,
)
from rondo.kernels.linear_attention.triton_states import step_kernel, walk_kernel
from rondo.kernels.linear_attention.triton_tiles import HEAD, KEY, NONE
from rondo.kernels.triton_configs import Config
from rondo.kernels.triton_support import cut, launch


class Sizes(NamedTuple):
    """Of a call; q and k have G heads, v has H."""

    B: int
    T: int
    G: int
    H: int
    K: int
    V: int
    C: int

    @property
    def chunks(self) -> int:
        return triton.cdiv(self.T, self.C)


class Problem(NamedTuple):
    """What every kernel of a call needs to know; tensors are contiguous."""

    sizes: Sizes
    log_decay: Tensor | None
    segment_ids: Tensor | None

    @property
    def gate(self) -> int:
        if self.log_decay is None:
            return NONE.value
        return HEAD.value if self.log_decay.dim() == 3 else KEY.value

    @property
    def kind(self) -> tuple[int, ...]:
        """What kernels are compiled for, the batch and its length apart."""
        return (*self.sizes[2:], self.gate)

    @property
    def by_key(self) -> bool:
        """Whether there is one decay a key channel."""
        return self.gate == KEY.value

    def states(self, like: Tensor, chunks: int | None = None) -> Tensor:
        """Room for the states between chunks, `(B, N, H, K, V)`, or for one a row and head."""
        batch, _, _, heads, key_dim, value_dim, _ = self.sizes
        shape = (batch, heads, key_dim, value_dim)
        if chunks is not None:
            shape = (batch, chunks, heads, key_dim, value_dim)
        return like.new_empty(shape, dtype=torch.float32)

    def reach(self, like: Tensor) -> Tensor:
        """Room for what a walk leaves of a state, `(B, N + 1, H, 1 or K)`: see `walk_kernel`."""
        batch, _, _, heads, key_dim, _, _ = self.sizes
        shape = (batch, self.sizes.chunks + 1, heads, key_dim if self.by_key else 1)
        return like.new_empty(shape, dtype=torch.float32)


class States(NamedTuple):
    """What chunks meet: see `load_states`."""

    met: Tensor
    first: Tensor | None = None
    reach: Tensor | None = None


def shape_class(x: Tensor) -> str:
    """Shapes that share a configuration: float32 tiles take twice the room of halves."""
    return "float32" if x.dtype == torch.float32 else "half"


def walk(
    problem: Problem,
    x: Tensor | None,
    y: Tensor | None,
    first: Tensor | None,
    like: Tensor,
    *,
    scale: float = 1.0,
    store: bool = True,
    reverse: bool = False,
    reach: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """States as each chunk meets them (empty without `store`) and at the end, float32: see
    `walk_kernel`, which fills `reach`. `like` is a tensor of the dtype of v."""
    batch, time, groups, heads, key_dim, value_dim, chunk = problem.sizes
    met = problem.states(like, problem.sizes.chunks) if store else None
    last = problem.states(like)

    def start(config: Config) -> None:
        tiles = cut(config, key_dim, value_dim)
        programs = triton.cdiv(key_dim, tiles["BK"]) * triton.cdiv(value_dim, tiles["BV"])
        walk_kernel[(batch * heads * programs,)](
            x, y, problem.log_decay, problem.segment_ids, first, met, last, reach,
            scale, time, G=groups, H=heads, K=key_dim, V=value_dim,
            C=chunk, GATE=problem.gate, REVERSE=reverse, **tiles,
        )  # fmt: skip

    form = "backward" if reverse else "forward" if store else "summary"
    launch("linear_attention_walk", shape_class(like), like, (*problem.kind, form), start)
    return last.new_empty(0) if met is None else met, last


def mix(
    problem: Problem,
    x: Tensor,
    y: Tensor | None,
    z: Tensor | None,
    states: States,
    scores: Tensor | None,
    scale: float,
    reverse: bool = False,
) -> Tensor:
    """Outputs, or in reverse the gradient of v, `(B, T, H, V)`: see `mix_kernel`."""
    batch, time, groups, heads, key_dim, value_dim, chunk = problem.sizes
    out = x.new_empty(batch, time, heads, value_dim)

    def start(config: Config) -> None:
        tiles = cut(config, key_dim, value_dim)
        programs = batch * problem.sizes.chunks * heads * triton.cdiv(value_dim, tiles["BV"])
        mix_kernel[(programs,)](
            x, y, z, *states, scores, problem.log_decay, problem.segment_ids, out, scale,
            time, G=groups, H=heads, K=key_dim, V=value_dim,
            C=chunk, GATE=problem.gate, REVERSE=reverse, **tiles,
        )  # fmt: skip

    form = "backward" if reverse else "forward"
    launch("linear_attention_mix", shape_class(x), x, (*problem.kind, form), start)
    return out


def score_gradients(problem: Problem, v: Tensor, do: Tensor, scale: float) -> Tensor:
    """Gradients of the products of q and k, `(B, T, H, C)`: see `score_gradients_kernel`."""
    batch, time, _, heads, _, value_dim, chunk = problem.sizes
    dscores = v.new_empty(batch, time, heads, chunk)

    def start(config: Config) -> None:
        tiles = cut(config, 0, value_dim)
        score_gradients_kernel[(batch * problem.sizes.chunks * heads,)](
            v, do, problem.log_decay, problem.segment_ids, dscores, scale, time,
            H=heads, V=value_dim, C=chunk, GATE=problem.gate, **tiles,
        )  # fmt: skip

    launch("linear_attention_score_gradients", shape_class(v), v, problem.kind, start)
    return dscores


def head_gradients(
    problem: Problem,
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    do: Tensor | None,
    dscores: Tensor | None,
    states: tuple[Tensor, States],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of q, k and log_decay (float32); without do, those of k and log_decay. `states` are
    those before chunks and the gradients of those after them: see `gradients_kernel`."""
    batch, time, groups, heads, key_dim, value_dim, chunk = problem.sizes
    dq, dk = torch.zeros_like(k) if do is None else torch.empty_like(k), torch.empty_like(k)
    before, after = states
    parts: list[Tensor] = []

    def start(config: Config) -> None:
        tiles = cut(config, key_dim, value_dim)
        key_blocks = triton.cdiv(key_dim, tiles["BK"])
        dg = None
        if problem.log_decay is not None:
            dg = k.new_empty(key_blocks, batch, time, heads, dtype=torch.float32)
            parts[:] = [dg]
        gradients_kernel[(batch * problem.sizes.chunks * groups * key_blocks,)](
            q, k, v, do, dscores, before, *after, problem.log_decay, problem.segment_ids,
            dq, dk, dg, scale, batch, time,
            G=groups, H=heads, K=key_dim, V=value_dim,
            C=chunk, GATE=problem.gate, **tiles,
        )  # fmt: skip

    launch("linear_attention_gradients", shape_class(k), k, problem.kind, start)
    return dq, dk, parts[0].sum(0) if parts else None


def step(
    problem: Problem, q: Tensor, k: Tensor, v: Tensor, first: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Output and state after one position, T = 1: see `step_kernel`."""
    batch, _, groups, heads, key_dim, value_dim, _ = problem.sizes
    o, last = torch.empty_like(v), problem.states(v)

    def start(config: dict[str, Any]) -> None:
        tiles = cut(config, key_dim, value_dim)
        step_kernel[(batch * heads * triton.cdiv(value_dim, tiles["BV"]),)](
            q, k, v, problem.log_decay, first, o, last, scale,
            G=groups, H=heads, K=key_dim, V=value_dim, GATE=problem.gate, **tiles,
        )  # fmt: skip

    launch("linear_attention_step", "*", v, problem.kind, start)
    return o, last
