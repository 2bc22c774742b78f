"""The stabiliser m of an mLSTM for all positions at once, and what it makes of gates.

`m_t = max(log f_t + m_{t-1}, i_t)` is linear where addition is a maximum and multiplication is
addition: over positions, such steps compose to `m -> max(a + m, b)`, which is scanned here.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rondo.kernels.segments import document_starts


class Peaks(NamedTuple):
    """`m_t = max(a_t + m, b_t)` for the m before the row; `(B, T, H)`."""

    a: Tensor
    """-inf from the row's second document on: those begin with 0."""
    b: Tensor


@torch.no_grad()
def peaks(write: Tensor, forget: Tensor, segment_ids: Tensor | None) -> Peaks:
    """Of input gates and log forget gates `(B, T, H)`. log2(T) passes, each of which doubles how
    far a position sees back."""
    a, b = forget.detach(), write.detach()
    if segment_ids is not None:
        starts = document_starts(segment_ids).unsqueeze(2)
        b = torch.where(starts, torch.maximum(a, b), b)
        a = torch.where(starts, -torch.inf, a)
    step = 1
    while step < a.shape[1]:
        earlier_a = F.pad(a[:, :-step], (0, 0, step, 0))
        earlier_b = F.pad(b[:, :-step], (0, 0, step, 0), value=-torch.inf)
        b = torch.maximum(earlier_b + a, b)
        a = earlier_a + a
        step *= 2
    return Peaks(a, b)


def relative(
    write: Tensor, forget: Tensor, m: Tensor, before: Tensor, segment_ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Input gates and log decays relative to the stabiliser m `(B, T, H)`, which is `before`
    `(B, H)` in front of the row: all decays at most 0, input gates at most 1. m is a constant."""
    m = m.detach()
    earlier = torch.cat((before.detach().unsqueeze(1), m[:, :-1]), 1)
    if segment_ids is not None:
        earlier = torch.where(document_starts(segment_ids).unsqueeze(2), 0.0, earlier)
    # Rounding must not let a decay above 0.
    shift = torch.minimum(earlier - m, -forget.detach())
    return torch.exp(write - m), forget + shift


def weighted_values(v: Tensor, gate: Tensor) -> Tensor:
    """`(B, T, H, V + 1)`: what is written with each key, into C and into n."""
    wide = F.pad(v.to(gate.dtype), (0, 1), value=1.0)
    return (wide * gate.unsqueeze(3)).to(v.dtype)
