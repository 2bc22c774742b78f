"""What ranks run to compare attention over ranks with attention over the whole row."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from rondo.kernels import attention
from rondo.parallel import collectives
from rondo.parallel.attention import attention_over_ranks
from rondo.tests.numerics import error_ratio, gradients

LONG = 150  # longer than a block of queries


@dataclass(frozen=True)
class Case:
    """One call; `starts` are positions where documents start in each of two rows, in units of a
    rank's length plus tokens."""

    heads: int = 3
    groups: int = 3
    length: int = 6
    window: int | None = None
    starts: tuple[tuple[tuple[int, int], ...], ...] | None = None
    dtype: torch.dtype = torch.float64
    scale: float | None = None
    lse: bool = False


# In a row: one at a cut; several in rank 0 and rank 1; one over three ranks, of four; single tokens
# around a cut; two rows with different documents.
CUT = (((1, 0),),) * 2
SEVERAL = (((0, 2), (0, 3), (1, 1), (1, 2), (1, 4)),) * 2
SPANNING = (((0, 5), (3, 2)), ((0, 1), (3, 1)))
SINGLES = (((0, 4), (0, 5), (1, 0), (1, 1), (1, 2)), ((1, 0), (1, 1)))
MIXED = (((0, 3), (1, 0), (1, 5)), ((0, 1), (1, 2)))

CASES = {
    "whole": Case(),
    "scale": Case(scale=0.7),
    "grouped": Case(6, 3),
    "one key head": Case(3, 1),
    "even heads, odd groups": Case(4, 1),
    "one position a rank": Case(length=1),
    "one position a rank, window": Case(length=1, window=3),
    "several blocks": Case(2, 1, LONG),
    "several blocks, window": Case(2, 1, LONG, window=LONG + 20),
    "window 1": Case(window=1),
    "window within": Case(window=4),
    "window of a length": Case(window=6),
    "window of a length and one": Case(window=7),
    "window of a length and two": Case(window=8),
    "window of two lengths": Case(window=14),
    "window beyond the row": Case(window=1000),
    "cut": Case(starts=CUT),
    "several": Case(starts=SEVERAL),
    "spanning": Case(starts=SPANNING),
    "singles": Case(starts=SINGLES),
    "mixed": Case(starts=MIXED),
    "mixed, grouped, window": Case(6, 3, window=9, starts=MIXED),
    "spanning, grouped, window": Case(6, 3, window=14, starts=SPANNING),
    "float32": Case(6, 3, 40, starts=MIXED, dtype=torch.float32),
    "bfloat16": Case(6, 3, 40, dtype=torch.bfloat16),
    "bfloat16, window": Case(6, 3, 40, window=50, starts=SPANNING, dtype=torch.bfloat16),
    "heads": Case(8, 4),
    "heads, all": Case(4, 4, starts=SPANNING),
    "heads, one position a rank": Case(4, 4, length=1),
    "heads, window": Case(8, 4, window=8),
    "heads, cut": Case(8, 4, starts=CUT),
    "heads, singles": Case(8, 4, window=3, starts=SINGLES),
    "log-sum-exp": Case(6, 3, window=9, starts=MIXED, lse=True),
    "log-sum-exp, bfloat16": Case(6, 3, 40, starts=SPANNING, dtype=torch.bfloat16, lse=True),
    "heads, log-sum-exp": Case(8, 4, starts=MIXED, lse=True),
    "heads, mixed": Case(8, 4, window=9, starts=MIXED, scale=0.7),
    "heads, float32": Case(8, 4, 40, starts=MIXED, dtype=torch.float32),
    "heads, bfloat16": Case(8, 4, 40, starts=SPANNING, dtype=torch.bfloat16),
}


def inputs(case: Case, size: int, seed: int = 0) -> tuple[list[Tensor], Tensor | None]:
    """q, k, v and ids of whole rows; a head is 8 wide, its value 5."""
    generator = torch.Generator().manual_seed(seed)
    time, ids = size * case.length, None
    shapes = [(2, time, n, d) for n, d in ((case.heads, 8), (case.groups, 8), (case.groups, 5))]
    qkv = [torch.randn(s, generator=generator, dtype=torch.float64).to(case.dtype) for s in shapes]
    if case.starts is not None:
        ids = torch.zeros(2, time, dtype=torch.long)
        for row, starts in zip(ids, case.starts, strict=True):
            for rank, token in starts:
                row[rank * case.length + token :] += 3
    return qkv, ids


def errors(case: Case, group: dist.ProcessGroup, seed: int = 0) -> dict[str, float]:
    """Of this rank's output and gradients, against float64 over the whole row."""
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    own = slice(rank * case.length, (rank + 1) * case.length)
    qkv, ids = inputs(case, size, seed)
    options = {"window": case.window, "scale": case.scale, "return_lse": case.lse}
    attend = attention_over_ranks(group)

    def whole(*qkv: Tensor) -> list[Tensor]:
        found = attention(*qkv, segment_ids=ids, backend="reference", **options)
        return list(found) if case.lse else [found]

    def over_ranks(*qkv: Tensor) -> list[Tensor]:
        local = [x[:, own] for x in qkv]
        found = attend(*local, segment_ids=None if ids is None else ids[:, own], **options)
        parts = list(found) if case.lse else [found]
        assert parts[0].dtype == case.dtype
        return [_in_place(part, own, size * case.length) for part in parts]

    expected, expected_grads = gradients(whole, [x.double() for x in qkv])
    actual, grads = gradients(over_ranks, qkv)
    names = ["o", *(["lse"] if case.lse else []), *"qkv"]
    pairs = zip(names, actual + grads, expected + expected_grads, strict=True)
    return {name: error_ratio(a[:, own], e[:, own]) for name, a, e in pairs}


def _in_place(part: Tensor, own: slice, time: int) -> Tensor:
    """A rank's stretch in a row of zeros."""
    out = part.new_zeros(part.shape[0], time, *part.shape[2:])
    out[:, own] = part
    return out


def compare(group: dist.ProcessGroup) -> dict[str, dict[str, float]]:
    return {name: errors(case, group) for name, case in CASES.items()}


def changed_positions(case: Case, group: dist.ProcessGroup, at: int) -> Tensor:
    """`(2, L)` bool: where this rank's output changes with the token at position `at`."""
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    own = slice(rank * case.length, (rank + 1) * case.length)
    qkv, ids = inputs(case, size)
    attend, results = attention_over_ranks(group), []
    for step in (0, 1):
        for x in qkv:
            x[:, at] += step
        local = [x[:, own].contiguous() for x in qkv]
        segments = None if ids is None else ids[:, own]
        results.append(attend(*local, window=case.window, segment_ids=segments))
    return (results[0] != results[1]).flatten(2).any(-1)


def transfers(case: Case, group: dist.ProcessGroup) -> list[Counter]:
    """Collectives that this rank starts in the forward and in the backward pass."""
    qkv, ids = inputs(case, 1)
    seen: Counter = Counter()
    originals = dist.all_to_all_single, dist.batch_isend_irecv, collectives._all_gather

    def counted(name, original):
        def call(*args, **kwargs):
            sends = [op for op in args[0] if op.op is dist.isend] if name == "sends" else [None]
            seen[name] += len(sends)
            return original(*args, **kwargs)

        return call

    dist.all_to_all_single = counted("all_to_all", originals[0])
    dist.batch_isend_irecv = counted("sends", originals[1])
    collectives._all_gather = counted("all_gather", originals[2])
    try:
        leaves = [x.requires_grad_() for x in qkv]
        attend = attention_over_ranks(group)
        out = attend(*leaves, window=case.window, segment_ids=ids)
        forward = +seen
        seen.clear()
        out.sum().backward()
        return [forward, +seen]
    finally:
        dist.all_to_all_single, dist.batch_isend_irecv, collectives._all_gather = originals


def refusals(group: dist.ProcessGroup) -> dict[str, str]:
    """What is said to calls that cannot be served."""
    (q, k, v), _ = inputs(Case(), 1)
    attend, said = attention_over_ranks(group), {}
    for name, args, options in (
        ("cache", (q[:, 1:], k, v), {}),
        ("backend", (q, k, v), {"backend": "flash"}),
        ("shape", (q, k[..., 1:], v), {}),
    ):
        try:
            attend(*args, **options)
        except ValueError as error:
            said[name] = str(error)
    return said


def subgroup_errors() -> list[dict[str, float]]:
    """Two interleaved pairs of ranks, each with rows of its own."""
    pairs = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    pair = dist.get_rank() % 2
    return [errors(CASES[name], pairs[pair], seed=pair + 1) for name in ("grouped", "heads")]


def everything() -> dict[str, object]:
    """All of the above in one start of the ranks."""
    group = dist.group.WORLD
    size = dist.get_world_size(group)
    return {
        "errors": compare(group),
        "changed": {
            name: changed_positions(CASES[name], group, CASES[name].length + 1)
            for name in ("whole", "mixed", "window within", "heads", "heads, mixed")
        },
        "transfers": {
            "heads": transfers(Case(8, 4, starts=((), ())), group),
            "ring": transfers(Case(starts=((), ())), group),
            "window": transfers(Case(window=4), group),
            "itself": transfers(Case(window=1), group),
        },
        "refusals": refusals(group),
        "subgroups": subgroup_errors() if size == 4 else [],
    }
