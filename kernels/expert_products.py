"""Products of the rows of experts: each row with the matrix of its group, sorted by group.

torch's grouped product on tensor cores where it takes the operands; no kernel of ours is beside it.

Letters: m rows, N groups, and `ends` `(N,)` int32, the row after each group's last.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rondo.kernels.backend import log_once
from rondo.kernels.tiles import has_numbers

ALIGNED_WIDTH = 8
"""Numbers in bfloat16 that rows must be a multiple of in torch's grouped products on a GPU."""


def refusal(x: Tensor, weight: Tensor) -> str | None:
    """Why torch's grouped product does not take these operands; None where it does."""
    if x.shape[0] == 0 or 0 in weight.shape:
        return "there are no numbers"
    if x.dtype == torch.bfloat16:
        widths = (x.shape[1], *weight.shape[1:])
        odd = [width for width in widths if width % ALIGNED_WIDTH]
        if x.is_cpu or not odd:
            return None
        return f"rows of {odd[0]} channels are no multiple of {ALIGNED_WIDTH}"
    if x.is_cpu and x.dtype in (torch.float16, torch.float32):
        # Its descriptions for the compiler and for a plan know no other type (torch 2.13).
        described = torch.compiler.is_compiling() or not has_numbers()
        return f"{x.dtype} is not bfloat16, all that it compiles for" if described else None
    return f"{x.dtype} is not bfloat16"


def served(x: Tensor, weight: Tensor) -> bool:
    """Whether torch's grouped product runs; where it does not, the log says why: a loop over
    experts, whose sizes the host has to wait for on a GPU, takes its place."""
    reason = refusal(x, weight)
    if x.shape[0]:
        backend = "loop" if reason else "grouped_mm"
        log_once("experts", backend, x.device.type, reason or "torch's own product takes them")
    return reason is None


def rows_times(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """`(m, b)`: rows of `x` `(m, a)` times their group's `weight` `(N, a, b)`."""
    if served(x, weight):
        return F.grouped_mm(x, weight, offs=ends)
    parts = zip(x.split(_sizes(ends, len(x))), weight.unbind(), strict=True)
    return torch.cat([rows @ matrix for rows, matrix in parts])


def outer_sums(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    """`(N, a, b)`: for each group the sum over its rows of outer products of `left` `(m, a)` and
    `right` `(m, b)`."""
    if served(left, right):
        return F.grouped_mm(left.mT, right, offs=ends)
    sizes = _sizes(ends, len(left))
    parts = zip(left.split(sizes), right.split(sizes), strict=True)
    return torch.stack([rows.mT @ others for rows, others in parts])


def _sizes(ends: Tensor, rows: int) -> list[int]:
    if not has_numbers():
        return even_loads(rows, len(ends))
    return ends.diff(prepend=ends.new_zeros(1)).tolist()


def even_loads(rows: int, count: int) -> list[int]:
    """`rows` divided among `count` as evenly as can be: what a plan, which knows no choices,
    supposes of them."""
    return [rows // count + (i < rows % count) for i in range(count)]
