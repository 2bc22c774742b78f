"""Gated linear attention on a GPU: states from chunk to chunk first, then all chunks at once.

The backward pass keeps the inputs only: the states between chunks are made again by the same
kernel, and a walk from the last chunk to the first makes their gradients.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rondo.kernels.linear_attention.triton_ahead_of_time import compilations
from rondo.kernels.linear_attention.triton_passes import backward_pass, forward_pass, one_position
from rondo.kernels.summary import DiagonalSummary
from rondo.kernels.triton_support import Compilation


def gated_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    segment_ids: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """The Triton form; see the package for the meaning of the arguments."""
    inputs = (q, k, v, log_decay, initial_state)
    if v.shape[1] == 1 and not _needs_gradient(*inputs):
        return one_position(*inputs, scale)
    return _Attention.apply(*inputs, segment_ids, scale, chunk_size)


def summarize(
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    segment_ids: Tensor | None,
    chunk_size: int,
) -> DiagonalSummary:
    """`gated_linear_attention_summary`: the walk over chunks without their outputs."""
    _, state = _Attention.apply(None, k, v, log_decay, None, segment_ids, 1.0, chunk_size)
    batch, time, heads, _ = v.shape
    transition = torch.ones(batch, heads, 1, 1, dtype=torch.float32, device=v.device)
    if log_decay is not None:
        steps = log_decay.float().reshape(batch, time, heads, -1)
        transition = steps.sum(1).exp().unsqueeze(-1)
    if segment_ids is not None:
        whole = segment_ids[:, 0] == segment_ids[:, -1]
        transition = torch.where(whole.view(-1, 1, 1, 1), transition, 0.0)
    return DiagonalSummary(transition, state)


def ahead_of_time() -> list[Compilation]:
    """The kernels as they are launched."""
    return compilations()


def _needs_gradient(*inputs: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)


class _Attention(torch.autograd.Function):
    """`(q, k, v, log_decay or None, initial_state or None, segment_ids or None, scale,
    chunk_size)` -> `(o, state)`; without q, o is empty."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        *tensors, scale, chunk_size = arguments
        ctx.save_for_backward(*tensors)
        ctx.options = (scale, chunk_size)
        ctx.set_materialize_grads(False)
        o, last = forward_pass(*tensors, scale, chunk_size)
        if tensors[0] is None:
            ctx.mark_non_differentiable(o)
        return o, last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        q, k, v, log_decay, initial_state, _ = tensors = ctx.saved_tensors
        do, dlast = grad_outputs
        if q is None:
            do = None
        gradients = backward_pass(*tensors, do, dlast, *ctx.options)
        inputs = (q, k, v, log_decay, initial_state)
        wanted = zip(gradients, inputs, strict=True)
        return *(None if x is None else dx for dx, x in wanted), None, None, None
