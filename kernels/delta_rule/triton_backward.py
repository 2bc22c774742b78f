"""Launches the Triton kernels of the gated delta rule's backward pass; see `triton_calls.py`."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from rondo.kernels.delta_rule.triton_calls import Problem, mix, score, transform, walk
from rondo.kernels.delta_rule.triton_gradients import pairs_kernel, readers_kernel
from rondo.kernels.delta_rule.triton_key_gradients import key_gate_kernel, key_readers_kernel
from rondo.kernels.delta_rule.triton_tiles import KEY, NONE
from rondo.kernels.triton_configs import Config


class Through(NamedTuple):
    """What passed through the chunks, and the gradients that came back."""

    states: Tensor  # before every chunk
    written: Tensor  # V'
    d_states: Tensor  # after every chunk
    d_written: Tensor
    d_o: Tensor | None


class Pairs(NamedTuple):
    """Gradients of what lies inside a chunk; see `pairs_kernel`."""

    d_values: Tensor  # of beta v
    d_reads: Tensor | None
    d_erases: Tensor


def backward(
    p: Problem, inverse: Tensor, first: Tensor, d_o: Tensor | None, d_last: Tensor
) -> tuple[Tensor | None, Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """Gradients of q, k, v, beta, log_decay (both float32) and the first state.

    W, U, the states and V' are made again from the inputs and `inverse`.
    """
    w, u = transform(p, inverse)
    own = None if d_o is None else mix(p, d_o, None, score(p), reverse=True)
    return gradients(p, inverse, first, d_o, d_last, w, u, own)


def gradients(
    p: Problem,
    inverse: Tensor,
    first: Tensor,
    d_o: Tensor | None,
    d_last: Tensor,
    w: Tensor,
    u: Tensor,
    own: Tensor | None,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """`backward` with W, U, and the gradient of V' from the outputs of its own chunk."""
    states, written, _ = walk(p, w, u, first, None, reverse=False)
    d_states, d_written, d_first = walk(p, w, own, d_last, d_o, reverse=True)
    through = Through(states, written, d_states, d_written, d_o)
    pairs, d_v, d_beta = _pairs(p, inverse, through)
    readers = _key_readers if p.gate == KEY.value else _readers
    d_q, d_k, beta_parts, d_gate = readers(p, through, pairs)
    return d_q, d_k, d_v, d_beta + beta_parts.sum(0), d_gate, d_first


def _pairs(p: Problem, inverse: Tensor, x: Through) -> tuple[Pairs, Tensor, Tensor]:
    """With the gradient of v, and a part of beta's."""
    d_values, d_v = torch.empty_like(p.v), torch.empty_like(p.v)
    d_erases = p.per_token(p.chunk)
    d_reads = None if x.d_o is None else p.per_token(p.chunk)
    d_beta = p.v.new_empty(p.v.shape[:3], dtype=torch.float32)
    programs = p.chunks * p.v.shape[2]

    def run(config: Config) -> None:
        pairs_kernel[(programs,)](
            p.v, p.beta, p.log_decay, p.segment_ids, inverse, x.written, x.d_o, x.d_written,
            d_values, d_v, d_reads, d_erases, d_beta, p.scale, p.v.shape[1],
            **p.constants(pairs_kernel, config),
        )  # fmt: skip

    p.start("pairs", run)
    return Pairs(d_values, d_reads, d_erases), d_v, d_beta


def _readers(
    p: Problem, x: Through, pairs: Pairs
) -> tuple[Tensor | None, Tensor, Tensor, Tensor | None]:
    """Gradients of q and k, the other parts of beta's `(parts, B, T, H)`, and the log decay's."""
    d_q = None if p.q is None else torch.empty_like(p.q)
    d_k = torch.empty_like(p.k)
    batch, time, heads, _ = p.v.shape
    parts: list[Tensor] = []

    def run(config: Config) -> None:
        constants = p.constants(readers_kernel, config)
        blocks = triton.cdiv(p.k.shape[3], constants["BK"])
        shape = (blocks, batch, time, heads)
        parts[:] = [p.v.new_empty(shape, dtype=torch.float32) for _ in range(2)]
        readers_kernel[(p.chunks * p.k.shape[2] * blocks,)](
            p.q, p.k, p.beta, p.log_decay, p.segment_ids, x.states, x.d_states, x.written, x.d_o,
            pairs.d_values, pairs.d_reads, pairs.d_erases, d_q, d_k, *parts, p.scale, batch, time,
            **constants,
        )  # fmt: skip

    p.start("readers", run)
    d_beta, d_gate = parts
    return d_q, d_k, d_beta, None if p.gate == NONE.value else d_gate.sum(0)


def _key_readers(
    p: Problem, x: Through, pairs: Pairs
) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    """As `_readers`, with a decay of its own for every key channel."""
    d_q = None if p.q is None else torch.empty_like(p.q)
    d_k = torch.empty_like(p.k)
    batch, time, heads, _ = p.v.shape
    width = p.k.shape[3]
    since, until, d_gate = (
        p.v.new_empty(batch, time, heads, width, dtype=torch.float32) for _ in range(3)
    )
    parts: list[Tensor] = []

    def read(config: Config) -> None:
        constants = p.constants(key_readers_kernel, config)
        blocks = triton.cdiv(width, constants["BK"])
        parts[:] = [p.v.new_empty(blocks, batch, time, heads, dtype=torch.float32)]
        key_readers_kernel[(p.chunks * p.k.shape[2] * blocks * (p.chunk // 16),)](
            p.q, p.k, p.beta, p.log_decay, p.segment_ids, x.states, x.d_states, x.written, x.d_o,
            pairs.d_values, pairs.d_reads, pairs.d_erases, d_q, d_k, *parts, since, until, p.scale,
            batch, time, **constants,
        )  # fmt: skip

    def gate(config: Config) -> None:
        constants = p.constants(key_gate_kernel, config)
        programs = p.chunks * heads * triton.cdiv(width, constants["BK"])
        key_gate_kernel[(programs,)](
            p.log_decay, p.segment_ids, x.states, x.d_states, since, until, d_gate, time,
            **constants,
        )  # fmt: skip

    p.start("key_readers", read)
    p.start("key_gate", gate)
    return d_q, d_k, parts[0], d_gate
