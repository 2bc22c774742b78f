"""Inputs, limits and comparisons of the tests of Newton's method over time."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from rondo.kernels import newton_rnn
from rondo.kernels.newton_rnn import CELLS, FunctionCell, chunked, gradients, reference
from rondo.tests.numerics import assert_ratio

BATCH, WIDTH = 2, 3
NAMES = ("para_gru", "para_lstm")
FUNCTIONS = {
    "para_gru": FunctionCell(reference.para_gru),
    "para_lstm": FunctionCell(reference.para_lstm, variables=2),
}
LIMITS = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-2}


def operands(
    name: str,
    time: int,
    dtype: torch.dtype = torch.float64,
    scale: float = 0.4,
    width: int = WIDTH,
    seed: int = 0,
) -> list[Tensor]:
    """Gates, recurrent weights, bias and an initial state."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    cell = CELLS[name]
    state = (BATCH, width) if cell.variables == 1 else (BATCH, cell.variables, width)
    wide = torch.promote_types(dtype, torch.float32)
    weights, bias = scale * draw(len(cell.weights), width), 0.5 * draw(3, width)
    return [
        draw(BATCH, time, 3, width).to(dtype),
        *(x.to(wide) for x in (weights, bias, draw(*state).tanh())),
    ]


def run(
    gates: Tensor, weights: Tensor, bias: Tensor, state: Tensor | None, cell: Any, **options: Any
) -> list[Tensor]:
    """Outputs and the last state."""
    found = newton_rnn(cell, gates, weights, bias=bias, initial_state=state, **options)
    return [found.h, found.state]


def documents(time: int, chance: float = 0.15) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return (torch.rand(BATCH, time, generator=generator) < chance).cumsum(1)


def compare(found: Any, expected: Any, limit: float) -> None:
    """Of what `gradients_of` returns."""
    names = ("h", "state", "dgates", "dweights", "dbias", "dinitial")
    pairs = zip(found[0] + found[1], expected[0] + expected[1], strict=True)
    for name, (x, y) in zip(names, pairs, strict=True):
        assert_ratio(name, x, y, limit)


def close(actual: Tensor, expected: Tensor, atol: float = 1e-10) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


@pytest.fixture(params=(1, 4, 7))
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Chunks and tiles of the backward pass so short that small tensors have many of them. Of one
    position, the method is ParaRNN's."""
    monkeypatch.setattr(chunked, "chunk_size", lambda *_: request.param)
    monkeypatch.setattr(gradients, "LEAST", 3)
    monkeypatch.setattr(gradients, "TILE", 1)
    return request.param


class Stretch:
    """One of several threads that hold a stretch of rows each."""

    def __init__(self, rank: int, board: list[Any], barrier: threading.Barrier, ids: Tensor):
        self.rank, self.count, self.board, self.barrier = rank, len(board), board, barrier
        self.ids = ids.tensor_split(self.count, 1)

    def gather(self, mine: Any) -> list[Any]:
        self.board[self.rank] = mine
        self.barrier.wait(20)
        everyones = list(self.board)
        self.barrier.wait(20)
        return everyones

    def before(self, summary: Any, first: Tensor) -> Tensor:
        state = first
        for rank, each in enumerate(self.gather(summary)[: self.rank]):
            state = self.passed(rank, each.apply(state))
        return state

    def after(self, summary: Any, last: Tensor) -> Tensor:
        everyones = self.gather(summary)
        for rank in range(self.count - 1, self.rank, -1):
            last = self.passed(rank - 1, everyones[rank].apply(last))
        return last

    def passed(self, rank: int, x: Tensor) -> Tensor:
        same = self.ids[rank][:, -1] == self.ids[rank + 1][:, 0]
        return x * same.view(-1, *(1,) * (x.dim() - 1))

    def agree(self, figures: Tensor) -> Tensor:
        return torch.stack(self.gather(figures)).amax(0)


def over_threads(count: int, ids: Tensor, function: Callable[[int, Stretch], Any]) -> list[Any]:
    board: list[Any] = [None] * count
    results: list[Any] = [None] * count
    barrier = threading.Barrier(count)

    def work(rank: int) -> None:
        try:
            results[rank] = function(rank, Stretch(rank, board, barrier, ids))
        except BaseException:
            barrier.abort()
            raise

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results
