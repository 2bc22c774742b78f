"""What ranks run in test_heads.py."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from rondo.kernels import nonlinear_rnn
from rondo.kernels.nonlinear_rnn import CELLS
from rondo.parallel.sequence import over_ranks
from rondo.tests.distributed.sequence_cases import BATCH, documents, draw, split, whole


def rnn_over_ranks(lengths: list[int], heads: list[int]) -> dict[str, float]:
    """Largest difference to whole sequences in one process, by case."""
    rank, size = dist.get_rank(), dist.get_world_size()
    worst = {}
    for name, cell in CELLS.items():
        operator = functools.partial(nonlinear_rnn, name)
        run = functools.partial(over_ranks(nonlinear_rnn, dist.group.WORLD), name)
        for length, count in zip(lengths, heads, strict=True):
            torch.manual_seed(length)
            gates = len(cell.gates)
            state = draw(BATCH, len(cell.states), count, 2)
            if name == "slstm":
                state[:, 2] = 1 + state[:, 2].abs()
            tensors = [
                draw(BATCH, length * size, gates, count, 2),
                draw(gates, count, 2, 2),
                draw(len(cell.biases), count, 2),
            ]
            for ids in (None, documents(length * size, size)):
                for first in (None, state):
                    arguments = tensors, first, ids, rank, size
                    found = split(_with_bias(run), *arguments)
                    expected = whole(_with_bias(operator), *arguments)
                    label = f"{name}, {count} heads, {ids is not None}, {first is not None}"
                    worst[label] = max(
                        float((a - b).abs().max()) / (1 + float(b.abs().max()))
                        for a, b in zip(found, expected, strict=True)
                    )
    return worst


def _with_bias(run: Callable[..., Any]) -> Callable[..., Any]:
    return lambda gates, recurrent, bias, **options: run(gates, recurrent, bias=bias, **options)
