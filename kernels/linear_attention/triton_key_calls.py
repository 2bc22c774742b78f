"""Launches the Triton kernels for one decay a key channel on contiguous tensors."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from rondo.kernels.linear_attention.triton_calls import Problem, States, shape_class
from rondo.kernels.linear_attention.triton_key_gradients import key_gradients_kernel
from rondo.kernels.linear_attention.triton_key_scores import gate_sums_kernel, key_scores_kernel
from rondo.kernels.triton_configs import Config
from rondo.kernels.triton_support import cut, launch

BLOCK = 16
"""Positions of a chunk within which decays are multiplied one by one."""


def key_scores(problem: Problem, q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Scores `(B, T, H, C)` in the dtype of q, scaled: see `key_scores_kernel`."""
    batch, time, groups, heads, key_dim, _, chunk = problem.sizes
    scores = q.new_empty(batch, time, heads, chunk)
    channels = max(16, triton.next_power_of_2(key_dim))

    def start(config: Config) -> None:
        key_scores_kernel[(batch * problem.sizes.chunks * heads * (chunk // BLOCK),)](
            q, k, problem.log_decay, problem.segment_ids, scores, scale, time,
            G=groups, H=heads, K=key_dim, C=chunk, BC=BLOCK, BK=channels, **config,
        )  # fmt: skip

    launch("linear_attention_key_scores", "*", q, problem.kind, start)
    return scores


def key_gradients(
    problem: Problem,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor,
    dscores: Tensor,
    states: tuple[Tensor, States],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of q, k and log_decay (in its dtype): see `key_gradients_kernel` and
    `gate_sums_kernel`; `states` as for `head_gradients`."""
    batch, time, groups, heads, key_dim, value_dim, chunk = problem.sizes
    before, after = states
    dq, dk = torch.empty_like(q), torch.empty_like(k)
    reads, writes = (q.new_empty(batch, time, heads, key_dim, dtype=torch.float32) for _ in "rw")
    dg = None if problem.log_decay is None else torch.empty_like(problem.log_decay)

    def start(config: Config) -> None:
        tiles = cut(config, key_dim, value_dim)
        programs = groups * (chunk // BLOCK) * triton.cdiv(key_dim, tiles["BK"])
        key_gradients_kernel[(batch * problem.sizes.chunks * programs,)](
            q, k, v, do, dscores, before, *after, problem.log_decay, problem.segment_ids,
            dq, dk, reads, writes, scale, time,
            G=groups, H=heads, K=key_dim, V=value_dim, C=chunk, BC=BLOCK, **tiles,
        )  # fmt: skip

    def start_sums(config: Config) -> None:
        tiles = cut(config, key_dim, value_dim)
        programs = heads * triton.cdiv(key_dim, tiles["BK"])
        gate_sums_kernel[(batch * problem.sizes.chunks * programs,)](
            reads, writes, before, *after, problem.log_decay, problem.segment_ids, dg, time,
            H=heads, K=key_dim, V=value_dim, C=chunk, **tiles,
        )  # fmt: skip

    launch("linear_attention_key_gradients", shape_class(q), q, problem.kind, start)
    launch("linear_attention_gate_sums", "*", q, problem.kind, start_sums)
    return dq, dk, dg
