"""LSTM heads by torch's own layer: on a CPU oneDNN runs a row from end to end in one call.

It makes the gates itself, so that it serves where the weights of the inputs are at hand. A row is
cut where any row of the batch begins a document, whose state is zero there. The sums of a product
may be taken in another order for another length: where rows are cut, last bits depend on it.

Letters in shapes: B batch, T time, H heads, E inputs and D channels of a head.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor

from rondo.kernels.backend import log_once
from rondo.kernels.linear import count_flops
from rondo.kernels.segments import document_starts
from rondo.kernels.tiles import has_numbers, values_are_known

DTYPES = (torch.float32, torch.bfloat16)
"""Of inputs; all is computed in float32."""
LEAST = 4
"""Positions of a stretch for each head, on average, from which a call a head is quicker than the
loop, which takes all heads together."""


def _flops(
    x: torch.Size, weight: torch.Size, recurrent: torch.Size, *_: Any, **options: Any
) -> int:
    """Products of the inputs and of the states."""
    return 2 * math.prod(x[:-1]) * (math.prod(weight) + math.prod(recurrent))


def _flops_back(*shapes: Any, **options: Any) -> int:
    """Two products for each of the forward pass."""
    return 2 * _flops(*shapes)


count_flops(torch.ops.aten, "mkldnn_rnn_layer", _flops)
count_flops(torch.ops.aten, "mkldnn_rnn_layer_backward", _flops_back)


@torch.compiler.disable  # it looks at documents; what is served breaks the graph in any case
def served(x: Tensor, segment_ids: Tensor | None) -> bool:
    """Whether `lstm` takes inputs `(B, T, H, E)` with these documents and is the fastest; where it
    does not, the log says why."""
    if not has_numbers():
        return False  # a plan counts what all devices do
    reason = _refusal(x, segment_ids)
    if reason is None:
        log_once("lstm", "torch.lstm", "cpu", "oneDNN runs a head's row in one call")
    else:
        log_once("lstm", "nonlinear_rnn", x.device.type, f"not torch.lstm: {reason}")
    return reason is None


def _refusal(x: Tensor, segment_ids: Tensor | None) -> str | None:
    if x.device.type != "cpu" or x.dtype not in DTYPES or torch.is_autocast_enabled("cpu"):
        return "it is for float32 and bfloat16 on a CPU"
    if type(x) is not Tensor:
        return f"it takes plain tensors, got {type(x).__name__}"
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return "without oneDNN it is slower"
    if segment_ids is not None and not values_are_known(segment_ids):
        return "it has to know where documents begin"
    least = LEAST * x.shape[2]
    if x.shape[1] < least * len(_stretches(x.shape[1], segment_ids)):
        return f"stretches of one document in each row have less than {least} positions"
    return None


@torch.compiler.disable  # as the loop over positions is: one graph break
def lstm(
    x: Tensor,
    weight: Tensor,
    recurrent: Tensor,
    bias: Tensor,
    initial_state: Tensor | None,
    segment_ids: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`nonlinear_rnn("lstm", ...)` with gates `weight x`; to be called where it is `served`.

    Args:
        x: `(B, T, H, E)` of `DTYPES`; all else of these or float32, and computed in float32.
        weight: `(H, 4, D, E)`, gates i, f, z, o.
        recurrent: `(H, 4, D, D)`.
        bias: `(H, 4, D)`.
        initial_state: `(B, 2, H, D)`, h and c before position 0, or None for zeros.
        segment_ids: `(B, T)` integers, non-decreasing in a row, or None.

    Returns:
        h `(B, T, H, D)` in the dtype of x and the state `(B, 2, H, D)` after the last position,
        float32, both differentiable once.
    """
    kind = x.dtype
    x, weight, recurrent, bias = (y.float() for y in (x, weight, recurrent, bias))
    batch, time, heads, _ = x.shape
    if initial_state is None:
        initial_state = x.new_zeros(batch, 2, heads, recurrent.shape[-1])
    stretches = _stretches(time, segment_ids)
    begun = None if segment_ids is None else document_starts(segment_ids)
    none = torch.zeros_like(bias[0].flatten())  # torch's layer has two biases that add up
    outputs, states = [], []
    for head, (own, state) in enumerate(zip(x.unbind(2), initial_state.unbind(2), strict=True)):
        parameters = [*(w[head].flatten(0, 1) for w in (weight, recurrent)), bias[head].flatten()]
        found, last = _head(own, [*parameters, none], state, stretches, begun)
        outputs.append(found)
        states.append(last)
    return torch.stack(outputs, 2).to(kind), torch.stack(states, 2)


def _head(
    x: Tensor,
    parameters: list[Tensor],
    state: Tensor,
    stretches: list[slice],
    begun: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """h `(B, T, D)` and the state after it, from inputs `(B, T, E)` and the state `(B, 2, D)`
    before; `begun` `(B, T)` says where documents begin."""
    h, c = (s.unsqueeze(0).contiguous() for s in state.unbind(1))
    rows = []
    for stretch in stretches:
        if stretch.start and begun is not None:
            fresh = begun[:, stretch.start, None]
            h, c = h.masked_fill(fresh, 0.0), c.masked_fill(fresh, 0.0)
        train = torch.is_grad_enabled()
        row, h, c = torch.lstm(
            x[:, stretch], (h, c), parameters, True, 1, 0.0, train, False, batch_first=True
        )
        rows.append(row)
    return torch.cat(rows, 1), torch.cat((h, c)).transpose(0, 1)


def _stretches(time: int, segment_ids: Tensor | None) -> list[slice]:
    """Positions between which no row begins a document."""
    cuts = [0, time]
    if segment_ids is not None:
        cuts[1:1] = document_starts(segment_ids).any(0).nonzero().flatten().tolist()
    return [slice(start, stop) for start, stop in itertools.pairwise(cuts)]
