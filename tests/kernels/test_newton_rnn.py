"""Newton's method over time: against the loop, and what the equations promise."""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from rondo.kernels import backend, combine, newton_rnn
from rondo.kernels.newton_rnn import CELLS, FunctionCell, blocks, chunked, gradients, reference
from rondo.kernels.newton_rnn.newton import advance, guess
from rondo.kernels.newton_rnn.sweeps import Rows, forward
from rondo.kernels.tiles import whole_tensors
from rondo.tests.numerics import assert_ratio
from rondo.tests.numerics import gradients as gradients_of

pytestmark = pytest.mark.quick

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


@pytest.mark.parametrize("name", NAMES)
def test_jacobians(name: str) -> None:
    """Against forward-mode differentiation of the paper's formulas and finite differences."""
    gates, weights, _, state = operands(name, 1, width=50)
    state = state.view(BATCH, -1, 1, 50).transpose(0, 1)
    inputs, rows = gates.unbind(2), weights.unbind(0)
    after, jacobian, _ = CELLS[name].linearize(state, inputs, rows)
    other, expected, _ = FUNCTIONS[name].linearize(state, inputs, rows)
    close(after, other, 1e-14)
    close(after, CELLS[name].step(state, inputs, rows), 1e-14)
    close(jacobian, expected, 1e-14)
    for j in range(len(state)):
        small = torch.zeros_like(state)
        small[j] = 1e-5
        up, down = (CELLS[name].step(state + x, inputs, rows) for x in (small, -small))
        close(jacobian[:, j], (up - down) / 2e-5, 1e-9)


@pytest.mark.parametrize("time", (1, 2, 3, 31, 32, 33, 1000, 2048))
@pytest.mark.parametrize("kind", ("diagonal", "rotation", "flip"))
@pytest.mark.parametrize("reverse", (False, True))
def test_scan_equals_a_sequential_solve(time: int, kind: str, reverse: bool) -> None:
    """Also for matrices that do not forget: rotations, and reflections of norm 1."""
    generator = torch.Generator().manual_seed(0)
    angle = 6.3 * torch.rand(BATCH, time, WIDTH, generator=generator, dtype=torch.float64)
    c, s = angle.cos(), angle.sin()
    entries = {"diagonal": [[c]], "rotation": [[c, -s], [s, c]], "flip": [[-c, s], [s, c]]}[kind]
    a = torch.stack([torch.stack(row) for row in entries])
    b = torch.randn(a.shape[1:], generator=generator, dtype=torch.float64)
    state = first = torch.randn(b[:, :, :1].shape, generator=generator, dtype=torch.float64)
    found, total = blocks.scan(a, b, first, reverse), blocks.across(a, reverse)
    vector = first
    for t in range(time)[:: -1 if reverse else 1]:
        vector = blocks.apply(a[:, :, :, t : t + 1], vector)
        if not reverse:
            state = blocks.apply(a[:, :, :, t : t + 1], state)
        elif t < time - 1:
            state = blocks.apply(a[:, :, :, t + 1 : t + 2], state)
        state = state + b[:, :, t : t + 1]
        close(found[:, :, t : t + 1], state, 1e-13 * time)
    close(blocks.apply(total, first), vector, 1e-13 * time)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("time", (1, 2, 4, 5, 28, 29, 61))
def test_newton_equals_the_loop(name: str, time: int, chunks: int) -> None:
    """Outputs, states and every gradient, with and without documents and a carried state."""
    inputs = operands(name, time)
    for ids in (None, documents(time)):
        found, expected = (
            gradients_of(functools.partial(run, cell=name, segment_ids=ids, backend=b), inputs)
            for b in ("chunked", "reference")
        )
        compare(found, expected, 1e-10)
        leaves = [x.clone().requires_grad_() for x in inputs[:2]]
        outputs = [
            newton_rnn(name, *leaves, segment_ids=ids, backend=b).h
            for b in ("chunked", "reference")
        ]
        close(*outputs)
        for x, y in zip(*(torch.autograd.grad(h.sum(), leaves) for h in outputs), strict=True):
            close(x, y)


@pytest.mark.parametrize("name", NAMES)
def test_sizes_that_training_has(name: str) -> None:
    """With the chunks that are chosen for them, in each dtype, also where channels alone are
    enough work."""
    for dtype, limit in LIMITS.items():
        inputs = operands(name, 150, dtype, width=40)
        exact = [x.double() for x in inputs]
        found = gradients_of(functools.partial(run, cell=name), inputs)
        compare(
            found,
            gradients_of(functools.partial(run, cell=name, backend="reference"), exact),
            limit,
        )
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        assert (found[0][0].dtype, found[0][1].dtype) == (dtype, wide)
    assert chunked.chunk_size(2, 150, 40, torch.device("cpu")) < 150
    assert chunked.chunk_size(8, 150, 4096, torch.device("cpu")) == 150


def test_a_plain_loop_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "WIDE", 64)
    lines: list[str] = []
    handlers = list(backend.logger.handlers)
    backend.show_choices(lines.append)
    for width in (31, 32, 32):
        gates, weights, _, _ = operands("para_gru", 40, width=width)
        health = newton_rnn("para_gru", gates, weights).health
        assert (health.iterations > 0) == (width == 31)
    backend.logger.handlers[:] = handlers
    assert len(lines) == 2 and "64 channels in all rows" in lines[1]
    assert lines[1].startswith("newton_rnn runs on backend chunked as a plain loop over time (")


@pytest.mark.parametrize("name", NAMES)
def test_gradcheck(name: str, chunks: int) -> None:
    inputs = [x.requires_grad_() for x in operands(name, 9, width=2)]
    for ids in (None, documents(9, 0.3)):
        assert torch.autograd.gradcheck(
            functools.partial(run, cell=name, segment_ids=ids, tolerance=1e-14), inputs
        )


@pytest.mark.parametrize("name", NAMES)
def test_gradient_of_the_state_alone(name: str, chunks: int) -> None:
    inputs = [x.requires_grad_() for x in operands(name, 20)]
    found, expected = (
        torch.autograd.grad(run(*inputs, name, backend=b)[1].sin().sum(), inputs)
        for b in ("chunked", "reference")
    )
    for x, y in zip(found, expected, strict=True):
        close(x, y)


def iterates(rows: Rows, first: Tensor, count: int) -> list[Tensor]:
    """The trajectories `(N, B, T, W)` that Newton's method goes through, from the guess on."""
    borders, found = guess(rows, first, None), []
    for _ in range(count + 1):
        sweep = forward(rows, borders, True)
        # With chunks of one position a border is the state before it.
        trajectory = torch.cat((borders[:, :, 1:], sweep.ends[:, :, -1:]), 2)
        found.append(trajectory if rows.size == 1 else sweep.states)
        borders, _ = advance(sweep, borders, first, None)
    return found


def solver_rows(
    name: str, time: int, scale: float, size: int, width: int = 16
) -> tuple[Rows, Tensor]:
    gates, weights, _, _ = operands(name, time, scale=scale, width=width)
    zero = gates.new_zeros(CELLS[name].variables, BATCH, 1, width)
    return Rows(CELLS[name], gates, weights, None, None, size), zero


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("time", "width"), ((256, 64), (2048, 256)))
def test_convergence_is_quadratic(name: str, time: int, width: int) -> None:
    """In single positions, at the weights they begin with: 3 iterations to 1e-7 and 4 to rounding,
    as published. (The fewer channels, the larger the largest of their weights may come out.)"""
    rows, first = solver_rows(name, time, 2 / math.sqrt(5 * width), 1, width)
    exact = forward(rows._replace(size=time), first, False).states
    errors = [float((x[-1] - exact[-1]).abs().max()) for x in iterates(rows, first, 4)]
    assert errors[0] > 0.1
    for error, limit in zip(errors[1:], (0.2, 2e-3, 1e-7, 1e-14), strict=True):
        assert error < limit, errors


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", (1, 4))
def test_first_states_are_exact_whatever_the_weights(name: str, size: int) -> None:
    """Also of a recurrence for which the method does not converge in so few iterations."""
    rows, first = solver_rows(name, 64, 3.0, size)
    exact = forward(rows._replace(size=64), first, False).states
    found = iterates(rows, first, 6)
    assert (found[-1][-1] - exact[-1]).abs().max() > 1e-3
    for k, states in enumerate(found):
        known = k * size if size == 1 else (k + 1) * size
        close(states[:, :, :known], exact[:, :, :known], 1e-12)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scale", (0.0, 0.5))
def test_no_iteration_leaves_the_guess(name: str, scale: float) -> None:
    """What a step makes of the zero state at every position. (There is no damping to switch
    iterations off with.) A ParaGRU without recurrent weights is linear: one more is exact."""
    rows, first = solver_rows(name, 33, scale, 1)
    guessed, after = iterates(rows, first, 1)
    zero = first.expand(-1, -1, 33, -1)
    expected = CELLS[name].step(zero, rows.gates.unbind(2), rows.weights.unbind(0))
    close(guessed[:, :, :-1], expected[:, :, :-1], 1e-14)  # the last is a step further
    exact = forward(rows._replace(size=33), first, False).states
    assert ((after - exact).abs().max() < 1e-13) == (name == "para_gru" and scale == 0)


def test_iterations_that_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """None for one position, one for a linear cell."""
    monkeypatch.setattr(chunked, "LEAST", 4)
    gates, weights, _, _ = operands("para_gru", 40)
    assert newton_rnn("para_gru", gates[:, :1], weights).health.iterations == 0
    linear = newton_rnn("para_gru", gates, 0 * weights)
    assert (linear.health.iterations, linear.health.extra) == (1, 0)
    steep = newton_rnn("para_gru", gates, 4 * weights, iterations=1)
    assert steep.health.extra == steep.health.iterations - 1 > 0


def test_health(monkeypatch: pytest.MonkeyPatch) -> None:
    """Residual and product of Jacobians are what they are said to be."""
    monkeypatch.setattr(chunked, "chunk_size", lambda *_: 5)
    gates, weights, _, _ = operands("para_gru", 23, scale=1.5)
    found = newton_rnn("para_gru", gates, weights, tolerance=1e-4)
    h = torch.cat((torch.zeros_like(found.h[:, :1]), found.h), 1)
    after, jacobian, _ = CELLS["para_gru"].linearize(
        h[None, :, :-1], gates.unbind(2), weights.unbind(0)
    )
    residual = (after[0] - found.h).abs().max()
    assert residual <= 1e-4 and found.health.residual <= 1e-4
    assert found.health.relative <= found.health.residual
    slopes = jacobian[0, 0].abs()
    product = max(float(slopes[:, t : t + 5].prod(1).max()) for t in range(0, 20, 5))
    assert abs(float(found.health.product) - product) < 1e-3
    for x in found.health:
        assert x.dim() == 0 and not x.requires_grad


@pytest.mark.parametrize("name", NAMES)
def test_failure_is_counted_and_right(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "chunk_size", lambda *_: 3)
    inputs = operands(name, 60, scale=6.0)
    options: dict[str, Any] = {"iterations": 1, "max_iterations": 2}
    found, expected = (
        gradients_of(functools.partial(run, cell=name, backend=b, **options), inputs)
        for b in ("chunked", "reference")
    )
    compare(found, expected, 1e-10)
    gates, weights, bias, state = inputs
    health = newton_rnn(name, gates, weights, bias=bias, initial_state=state, **options).health
    assert (health.sequential, health.iterations, health.extra) == (1, 2, 1)
    assert health.relative > 1e-12
    calm = newton_rnn(name, gates, 0.05 * weights, iterations=1).health
    assert calm.sequential == 0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("backend", ("chunked", "reference"))
def test_packed_documents_equal_separate_calls(name: str, backend: str, chunks: int) -> None:
    lengths = (10, 1, 13, 1, 1, 4)
    inputs = operands(name, sum(lengths))
    ids = torch.repeat_interleave(torch.tensor([3, 4, 7, 8, 9, 20]), torch.tensor(lengths))

    def separate(gates: Tensor, weights: Tensor, bias: Tensor, state: Tensor) -> list[Tensor]:
        outputs = []
        for part in gates.split(lengths, 1):
            h, last = run(part, weights, bias, state, name, backend=backend)
            outputs.append(h)
            state = torch.zeros_like(state)
        return [torch.cat(outputs, 1), last]

    packed = functools.partial(run, cell=name, segment_ids=ids.expand(BATCH, -1), backend=backend)
    compare(gradients_of(packed, inputs), gradients_of(separate, inputs), 1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_documents_do_not_leak(name: str, chunks: int) -> None:
    gates, weights, bias, state = operands(name, 40)
    ids = (torch.arange(40) >= 17).long().expand(BATCH, -1)
    function = functools.partial(run, cell=name, segment_ids=ids)
    found = gradients_of(function, [gates, weights, bias, state])
    other = torch.cat((gates[:, :17] * 0.5 + 0.1, gates[:, 17:]), 1)
    changed = gradients_of(function, [other, weights, bias, state * 0.5])
    for x, y in ((found[0][0], changed[0][0]), (found[1][0], changed[1][0])):
        close(x[:, 17:], y[:, 17:], 1e-13)
        assert not torch.equal(x[:, :17], y[:, :17])
    close(found[0][1], changed[0][1], 1e-13)


@pytest.mark.parametrize("name", NAMES)
def test_split_with_carried_state_equals_whole(name: str, chunks: int) -> None:
    gates, weights, bias, state = operands(name, 31)
    whole = run(gates, weights, bias, state, name)
    for cut in (1, 12, 30):
        h, middle = run(gates[:, :cut], weights, bias, state, name)
        rest, last = run(gates[:, cut:], weights, bias, middle, name)
        close(torch.cat((h, rest), 1), whole[0])
        close(last, whole[1])


@pytest.mark.parametrize("name", NAMES)
def test_decoding_equals_one_pass(name: str, chunks: int) -> None:
    gates, weights, bias, _ = operands(name, 24)
    whole = run(gates, weights, bias, None, name)
    h, state = run(gates[:, :15], weights, bias, None, name)
    outputs = [h]
    for t in range(15, 24):
        h, state = run(gates[:, t : t + 1], weights, bias, state, name)
        outputs.append(h)
    close(torch.cat(outputs, 1), whole[0])
    close(state, whole[1])


@pytest.mark.parametrize("name", NAMES)
def test_causality(name: str, chunks: int) -> None:
    inputs = [x.requires_grad_() for x in operands(name, 22)]
    h, _ = run(*inputs, name)
    for t in (0, 3, 4, 13):
        (grad,) = torch.autograd.grad(h[:, t].sum(), inputs[:1], retain_graph=True)
        assert not grad[:, t + 1 :].any() and grad[:, t].any()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_extreme_gates_are_finite(name: str, dtype: torch.dtype, chunks: int) -> None:
    """Gates that are shut and gates that are open, and states that are kept for ever."""
    gates, *others = operands(name, 50, dtype, scale=2.0)
    gates = 1e4 * gates.sign()
    found = gradients_of(functools.partial(run, cell=name), [gates, *others])
    expected = gradients_of(
        functools.partial(run, cell=name, backend="reference"), [gates, *others]
    )
    for x in found[0] + found[1]:
        assert x.isfinite().all()
    compare(found, expected, LIMITS[dtype])


def test_what_chunks_forget_costs_no_denormal_numbers() -> None:
    """Products of Jacobians that vanish are zero, not numbers that a processor is slow with."""
    gates = torch.full((1, 300, 3, 4), 3.0)
    weights = torch.full((3, 4), 0.1)
    rows = Rows(CELLS["para_gru"], gates, weights, None, None, 100)
    product = forward(rows, torch.zeros(1, 1, 3, 4), True).products
    assert product is not None and not product.any()


def leaky(h: Tensor, gates: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """A cell that nobody differentiated."""
    (keep, new), (a,) = gates, weights
    keep = torch.sigmoid(keep)
    return keep * h + (1 - keep) * torch.sin(new + a * h)


def test_a_function_is_a_cell(chunks: int) -> None:
    gates, weights, bias, state = operands("para_gru", 30)
    inputs = [gates[:, :, :2], weights[:1], bias[:2], state]
    for ids in (None, documents(30)):
        found, expected = (
            gradients_of(functools.partial(run, cell=leaky, segment_ids=ids, backend=b), inputs)
            for b in ("chunked", "reference")
        )
        compare(found, expected, 1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_functions_equal_the_cells_by_hand(name: str, chunks: int) -> None:
    inputs = operands(name, 30)
    found, expected = (
        gradients_of(functools.partial(run, cell=cell, segment_ids=documents(30)), inputs)
        for cell in (FUNCTIONS[name], name)
    )
    compare(found, expected, 1e-10)


def test_functions_that_hide_a_parameter_are_refused() -> None:
    gates, weights, _, _ = operands("para_gru", 5)
    hidden = torch.ones(WIDTH, dtype=gates.dtype, requires_grad=True)

    def cell(h: Tensor, gates: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
        return torch.tanh(gates[0] + weights[0] * h) * hidden

    with pytest.raises(ValueError, match="requires grad and is no argument"):
        newton_rnn(cell, gates, weights.requires_grad_())
    hidden.requires_grad_(False)
    assert newton_rnn(cell, gates, weights).h.requires_grad


def test_functions_that_are_not_elementwise_are_refused() -> None:
    gates, weights, _, _ = operands("para_gru", 5)
    with pytest.raises(ValueError, match="not elementwise"):
        newton_rnn(lambda h, g, a: torch.tanh(g[0] + h.flip(-1)), gates, weights)
    with pytest.raises(ValueError, match=r"returns \(2, 2, 1\)"):
        newton_rnn(lambda h, g, a: torch.tanh(g[0] + h)[..., :1], gates, weights)
    with pytest.raises(ValueError, match="returns 1 tensors, expected 2"):
        newton_rnn(FunctionCell(lambda s, g, a: s[0], variables=2), gates, weights)


@pytest.mark.parametrize("name", NAMES)
def test_trailing_dimensions(name: str) -> None:
    gates, weights, bias, state = operands(name, 20, width=6)
    expected = run(gates, weights, bias, state, name)
    heads = [x.unflatten(-1, (2, 3)) for x in (gates, weights, bias, state)]
    for x, y in zip(run(*heads, name), expected, strict=True):
        close(x.flatten(-2), y, 0)


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


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("count", (2, 4))
@pytest.mark.parametrize("fails", (False, True))
def test_stretches_equal_whole_rows(name: str, count: int, fails: bool, chunks: int) -> None:
    """Holders of stretches that exchange summaries: documents that end with a stretch, span three,
    or lie inside one; and rows for which the method fails."""
    time = 9 * count
    gates, weights, bias, state = operands(name, time, scale=6.0 if fails else 0.4)
    ids = documents(time, 0.05)
    ids[0] = (torch.arange(time) >= 9).long() + (torch.arange(time) == time - 1)
    options: dict[str, Any] = {"max_iterations": 1 if fails else 30, "iterations": 0}
    expected = gradients_of(
        functools.partial(run, cell=name, segment_ids=ids, **options), [gates, weights, bias, state]
    )
    (at_h, at_state) = (
        torch.randn(x.shape, generator=generator, dtype=torch.float64)
        for generator in [torch.Generator().manual_seed(0)]
        for x in expected[0]
    )

    def work(rank: int, neighbours: Stretch) -> Any:
        parts = [x.tensor_split(count, 1)[rank] for x in (gates, ids, at_h)]
        leaves = [x.clone().requires_grad_() for x in (parts[0], weights, bias, state)]
        found = newton_rnn(
            name,
            leaves[0],
            leaves[1],
            bias=leaves[2],
            initial_state=leaves[3],
            segment_ids=parts[1],
            neighbours=neighbours,
            **options,
        )
        grads = torch.autograd.grad((found.h, found.state), leaves, (parts[2], at_state))
        return found, grads

    results = over_threads(count, ids, work)
    close(torch.cat([found.h for found, _ in results], 1), expected[0][0])
    close(results[-1][0].state, expected[0][1])
    close(torch.cat([grads[0] for _, grads in results], 1), expected[1][0])
    for i in (1, 2):
        close(sum(grads[i] for _, grads in results), expected[1][i])
    close(results[0][1][3], expected[1][3])
    health = [found.health for found, _ in results]
    assert all(each == health[0] for each in health)
    if fails and chunks == 1:
        assert health[0].sequential == 1


def growing_or_steep(h: Tensor, gates: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """A channel without bound, or one that takes a few iterations."""
    (new, scale), (a, grows) = gates, weights
    return torch.where(grows > 0, h + scale, torch.sin(new + a * h))


class OneAtATime(FunctionCell):
    """Forward mode has one level for all threads."""

    lock = threading.Lock()

    def linearize(self, *arguments: Any) -> Any:
        with self.lock:
            return super().linearize(*arguments)


@pytest.mark.parametrize("count", (1, 2))
def test_a_large_channel_does_not_hide_the_others(count: int, chunks: int) -> None:
    """A channel that reaches 1e7 beside some within 1, by themselves and over stretches."""
    gates, weights, _, _ = operands("para_gru", 20, scale=1.0)
    gates = torch.stack((gates[:, :, 0], 5e5 * torch.ones_like(gates[:, :, 0])), 2)
    weights = torch.stack((weights[0], torch.tensor([0.0, 1.0, 0.0], dtype=gates.dtype)))
    expected = newton_rnn(growing_or_steep, gates, weights, backend="reference").h
    options: dict[str, Any] = {"tolerance": 1e-6, "max_iterations": 30}
    cell = OneAtATime(growing_or_steep)

    def work(rank: int, neighbours: Stretch) -> Any:
        part, given = gates.tensor_split(count, 1)[rank], neighbours if count > 1 else None
        return newton_rnn(cell, part, weights, neighbours=given, **options)

    results = over_threads(count, torch.zeros(BATCH, 20, dtype=torch.long), work)
    h = torch.cat([found.h for found in results], 1)
    assert expected[..., 1].max() == 1e7
    close(h[..., ::2], expected[..., ::2], 1e-5)
    close(h[..., 1] / 1e7, expected[..., 1] / 1e7, 1e-6)
    assert all(found.health.sequential == 0 for found in results)
    assert results[0].health.relative <= 1e-6


@pytest.mark.parametrize("variables", (1, 2))
def test_an_overflow_passes_over_stretches(variables: int, chunks: int) -> None:
    """Derivatives of 1e60 a position, whose products overflow in a stretch: all is exact in as many
    iterations as there are positions, and one for each border."""
    gates, weights, _, _ = operands("para_gru", 27)

    def steep(state: Any, gates: Sequence[Tensor], weights: Sequence[Tensor]) -> Any:
        first = state if variables == 1 else state[0]
        following = 0.4 * torch.sin(gates[0] + 1e60 * first)
        return following if variables == 1 else (following, following + 0.5 * state[1])

    cell = OneAtATime(steep, variables)
    expected = newton_rnn(cell, gates, weights, backend="reference").h

    def work(rank: int, neighbours: Stretch) -> Any:
        part = gates.tensor_split(3, 1)[rank]
        return newton_rnn(cell, part, weights, max_iterations=40, neighbours=neighbours)

    results = over_threads(3, torch.zeros(BATCH, 27, dtype=torch.long), work)
    assert all(found.health.sequential == 0 for found in results)
    close(torch.cat([found.h for found in results], 1), expected, 1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_summaries_compose(name: str) -> None:
    """The last ones of two stretches, together, take the first state to the last one."""
    gates, weights, _, state = operands(name, 40)

    def work(rank: int, neighbours: Stretch) -> list[Any]:
        seen: list[Any] = []
        exchange = neighbours.before
        neighbours.before = lambda summary, first: seen.append(summary) or exchange(summary, first)
        part = gates.tensor_split(2, 1)[rank]
        newton_rnn(name, part, weights, initial_state=state, neighbours=neighbours)
        return seen

    seen = over_threads(2, torch.zeros(BATCH, 40, dtype=torch.long), work)
    expected = newton_rnn(name, gates, weights, initial_state=state).state
    if state.dim() == 3:
        expected, state = (x.mT.unsqueeze(-1) for x in (expected, state))
    close(combine(seen[0][-1], seen[1][-1]).apply(state), expected)
    assert len(seen[0]) == len(seen[1]) > 2


@pytest.mark.parametrize("name", NAMES)
def test_nothing_of_the_iterations_is_kept(name: str) -> None:
    """What the backward pass holds: the inputs, and the states once."""
    kept: list[Tensor] = []
    gates, weights, bias, state = (x.requires_grad_() for x in operands(name, 64))
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        newton_rnn(name, gates, weights, bias=bias, initial_state=state)
    states = 65 * CELLS[name].variables * BATCH * WIDTH
    assert sum(x.numel() for x in kept) == states + sum(x.numel() for x in (gates, weights, bias))


def test_second_derivatives_are_refused() -> None:
    """Also where only the loss is linear, so that nothing else would notice."""
    gates, weights, _, _ = (x.requires_grad_() for x in operands("para_gru", 8))
    h = newton_rnn("para_gru", gates, weights).h
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(h.sum(), [gates], create_graph=True)


def test_in_a_compiled_function() -> None:
    inputs = [x.requires_grad_() for x in operands("para_gru", 40)]
    function = functools.partial(run, cell="para_gru")
    compiled = torch.compile(lambda *x: [y * 2 for y in function(*x)], backend="aot_eager")
    close(compiled(*inputs)[0], 2 * function(*inputs)[0])


def test_tensors_without_numbers() -> None:
    """Shapes come out as they should, and no number is asked for."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    for cell in (*NAMES, FUNCTIONS["para_gru"]):
        name = cell if isinstance(cell, str) else "para_gru"
        real = operands(name, 40)
        with FakeTensorMode() as mode, whole_tensors():
            inputs = [mode.from_tensor(x).requires_grad_() for x in real]
            h, state = run(*inputs, cell)
            grads = torch.autograd.grad(h.sum() + state.sum(), inputs)
        assert h.shape == (BATCH, 40, WIDTH) and state.shape == real[3].shape
        assert [x.shape for x in grads] == [x.shape for x in real]


@pytest.mark.parametrize(
    ("change", "message"),
    (
        ({"cell": "para_lstn"}, "did you mean 'para_lstm'"),
        ({"gates": torch.zeros(2, 0, 3, 4)}, "at least one position"),
        ({"gates": torch.zeros(2, 5, 2, 4)}, "has 2 gates at dimension 2, expected 3: z, r, n"),
        ({"recurrent": torch.zeros(3, 5)}, r"expected rows \(a_z, a_r, a_n\) of \(4,\)"),
        ({"recurrent": torch.zeros(5, 4)}, r"expected rows \(a_z, a_r, a_n\)"),
        ({"bias": torch.zeros(4)}, r"expected \(3, 4\)"),
        ({"initial_state": torch.zeros(2, 1, 4)}, r"expected \(2, 4\)"),
        ({"segment_ids": torch.zeros(2, 4, dtype=torch.long)}, r"\(B, T\) = \(2, 5\)"),
        ({"iterations": 4, "max_iterations": 3}, "from 0 to max_iterations = 3"),
        ({"tolerance": 0.0}, "between 0 and 1"),
        ({"backend": "reference", "neighbours": object()}, "knows no neighbours"),
    ),
)
def test_what_does_not_fit_is_named(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "cell": "para_gru",
        "gates": torch.zeros(2, 5, 3, 4),
        "recurrent": torch.zeros(3, 4),
    }
    with pytest.raises(ValueError, match=message):
        newton_rnn(**{**arguments, **change})
