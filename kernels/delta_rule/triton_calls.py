"""Launches the Triton kernels of the gated delta rule on contiguous tensors of one dtype."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from rondo.kernels.delta_rule.triton_inverse import inverse_kernel, transform_kernel
from rondo.kernels.delta_rule.triton_keys import scores_kernel
from rondo.kernels.delta_rule.triton_outputs import mix_kernel
from rondo.kernels.delta_rule.triton_states import step_kernel, walk_kernel
from rondo.kernels.delta_rule.triton_tiles import HEAD, KEY, NONE
from rondo.kernels.triton_configs import Config
from rondo.kernels.triton_support import cut, launch

LARGEST_CHUNK = {torch.float32: 16}
"""Positions of a chunk, where products have no tensor cores and their tiles fill registers."""


class Problem(NamedTuple):
    """The inputs of a call: q is None where nothing is read; q and k have G heads, v has H."""

    q: Tensor | None
    k: Tensor
    v: Tensor
    beta: Tensor
    log_decay: Tensor | None
    segment_ids: Tensor | None
    scale: float
    chunk: int

    @property
    def gate(self) -> int:
        """NONE, HEAD or KEY."""
        if self.log_decay is None:
            return NONE.value
        return HEAD.value if self.log_decay.dim() == 3 else KEY.value

    @property
    def chunks(self) -> int:
        """Of all rows."""
        return self.v.shape[0] * triton.cdiv(self.v.shape[1], self.chunk)

    def constants(self, kernel: Any, config: Config) -> dict[str, int]:
        """Sizes that `kernel` is compiled for; a configuration's tiles are cut to what is there."""
        sizes = {"G": self.k.shape[2], "H": self.v.shape[2], "K": self.k.shape[3]}
        sizes |= {"V": self.v.shape[3], "C": self.chunk, "GATE": self.gate}
        sizes = {name: size for name, size in sizes.items() if name in kernel.arg_names}
        return sizes | cut(config, self.k.shape[3], self.v.shape[3])

    def per_token(self, width: int) -> Tensor:
        """Room for `(B, T, H, width)` in the dtype of v."""
        return self.v.new_empty(*self.v.shape[:3], width)

    def state(self) -> Tensor:
        """Room for a state a row and head, `(B, H, K, V)` float32."""
        batch, _, heads, width = self.v.shape
        return self.v.new_empty(batch, heads, self.k.shape[3], width, dtype=torch.float32)

    def start(self, kernel: str, run: Callable[[Config], None], *form: str) -> None:
        """Launches with the configuration for these dtypes and dimensions; kernels in several forms
        name theirs."""
        shape = shape_class(self.v.dtype, self.k.shape[3])
        sizes = (*self.k.shape[2:], *self.v.shape[2:], self.chunk, self.gate, *form)
        launch(f"delta_rule_{kernel}", shape, self.v, sizes, run)


def make_problem(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    segment_ids: Tensor | None,
    scale: float,
    chunk_size: int,
) -> Problem:
    """Products are made in the dtype of v; gates keep theirs."""
    return Problem(
        None if q is None else q.to(v.dtype).contiguous(),
        k.to(v.dtype).contiguous(),
        v.contiguous(),
        beta.contiguous(),
        None if log_decay is None else log_decay.contiguous(),
        None if segment_ids is None else segment_ids.contiguous(),
        scale,
        chunk_length(v, chunk_size),
    )


def chunk_length(v: Tensor, chunk_size: int) -> int:
    """Positions of a chunk: at least the 16 of a block, and no more than the row needs."""
    most = LARGEST_CHUNK.get(v.dtype, 64)
    return max(16, min(chunk_size, most, 1 << (v.shape[1] - 1).bit_length()))


def shape_class(dtype: torch.dtype, key_dim: int) -> str:
    """Shapes that share a configuration: float32 tiles take twice the room of halves."""
    size = "float32" if dtype == torch.float32 else "half"
    return f"{size} wide" if key_dim > 128 else size


def invert(p: Problem) -> Tensor:
    """A of every chunk, `(B, T, H, C)` in the dtype of v: see `inverse_kernel`."""
    inverse = p.per_token(p.chunk)
    programs = p.chunks * p.v.shape[2]

    def run(config: Config) -> None:
        constants = p.constants(inverse_kernel, config)
        inverse_kernel[(programs,)](
            p.k, p.beta, p.log_decay, p.segment_ids, inverse, p.v.shape[1], **constants
        )

    p.start("inverse", run)
    return inverse


def transform(p: Problem, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """W `(B, T, H, K)` and U `(B, T, H, V)`: see `transform_kernel`."""
    w, u = p.per_token(p.k.shape[3]), torch.empty_like(p.v)
    programs = p.chunks * p.v.shape[2]

    def run(config: Config) -> None:
        transform_kernel[(programs,)](
            p.k, p.v, p.beta, p.log_decay, p.segment_ids, inverse, w, u, p.v.shape[1],
            **p.constants(transform_kernel, config),
        )  # fmt: skip

    p.start("transform", run)
    return w, u


def walk(
    p: Problem, w: Tensor, u: Tensor | None, first: Tensor, d_o: Tensor | None, *, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """States (or their gradients) as each chunk meets them `(B, N, H, K, V)`, V' (or its gradient)
    and the state at the end, float32: see `walk_kernel`."""
    written = torch.empty_like(p.v)
    batch, _, heads, width = p.v.shape
    states = p.v.new_empty(batch, p.chunks // batch, heads, p.k.shape[3], width)
    return states, written, _walk(p, w, u, first, d_o, states, written, reverse)


def walk_back(p: Problem, w: Tensor, own: Tensor, d_o: Tensor) -> Tensor:
    """The gradient of the state before the row by the outputs alone, float32."""
    return _walk(p, w, own, torch.zeros_like(p.state()), d_o, None, None, True)


def _walk(
    p: Problem,
    w: Tensor,
    u: Tensor | None,
    first: Tensor,
    d_o: Tensor | None,
    states: Tensor | None,
    written: Tensor | None,
    reverse: bool,
) -> Tensor:
    """Fills states and written, which may be left out, and returns the state at the end."""
    batch, time, heads, width = p.v.shape
    last = p.state()

    def run(config: Config) -> None:
        constants = p.constants(walk_kernel, config) | {"REVERSE": reverse}
        programs = batch * heads * triton.cdiv(width, constants["BV"])
        walk_kernel[(programs,)](
            p.q, p.k, w, p.log_decay, p.segment_ids, u, d_o, first, states, written, last,
            p.scale, time, **constants,
        )  # fmt: skip

    p.start("walk", run, "backward" if reverse else "forward")
    return last


def summarize(p: Problem, w: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """The transition `(B, H, K, K)` and the state that zero ends as, float32: see `walk_kernel`."""
    batch, time, heads, value_dim = p.v.shape
    key_dim = p.k.shape[3]
    width = key_dim + value_dim
    last = p.v.new_empty(batch, heads, key_dim, width, dtype=torch.float32)

    def run(config: Config) -> None:
        constants = p.constants(walk_kernel, config) | {"REVERSE": False}
        programs = batch * heads * triton.cdiv(width, constants["BV"])
        walk_kernel[(programs,)](
            None, p.k, w, p.log_decay, p.segment_ids, u, None, None, None, None, last,
            p.scale, time, **constants,
        )  # fmt: skip

    p.start("walk", run, "summary")
    return last[..., value_dim:].contiguous(), last[..., :value_dim].contiguous()


def score(p: Problem) -> Tensor | None:
    """Decayed products of queries and keys `(B, T, H, C)` where they need a kernel of their own."""
    if p.q is None or p.gate != KEY.value:
        return None
    scores = p.per_token(p.chunk)
    programs = p.chunks * p.v.shape[2] * (p.chunk // 16)

    def run(config: Config) -> None:
        constants = p.constants(scores_kernel, config)
        scores_kernel[(programs,)](
            p.q, p.k, p.log_decay, p.segment_ids, scores, p.v.shape[1], **constants
        )

    p.start("scores", run)
    return scores


def mix(
    p: Problem, x: Tensor, states: Tensor | None, scores: Tensor | None, *, reverse: bool = False
) -> Tensor:
    """Outputs, or in reverse the gradient of V' from its own chunk: see `mix_kernel`."""
    out = torch.empty_like(x)

    def run(config: Config) -> None:
        constants = p.constants(mix_kernel, config)
        programs = p.chunks * x.shape[2] * triton.cdiv(x.shape[3], constants["BV"])
        mix_kernel[(programs,)](
            p.q, p.k, x, states, scores, p.log_decay, p.segment_ids, out, p.scale, x.shape[1],
            **constants, REVERSE=reverse,
        )  # fmt: skip

    p.start("mix", run, "backward" if reverse else "forward")
    return out


def step(p: Problem, first: Tensor) -> tuple[Tensor, Tensor]:
    """Output and state after one position, T = 1: see `step_kernel`."""
    o, last = torch.empty_like(p.v), p.state()
    batch, _, heads, width = p.v.shape
    key_dim = max(16, triton.next_power_of_2(p.k.shape[3]))

    def run(config: Config) -> None:
        constants = p.constants(step_kernel, config) | {"BK": key_dim}
        step_kernel[(batch * heads * triton.cdiv(width, constants["BV"]),)](
            p.q, p.k, p.v, p.beta, p.log_decay, first, o, last, p.scale, **constants
        )

    p.start("step", run)
    return o, last
