"""Newton's method over time: against the loop, and what the equations promise."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from rondo.kernels import backend, newton_rnn
from rondo.kernels.newton_rnn import CELLS, blocks, chunked
from rondo.kernels.newton_rnn.newton import advance, guess
from rondo.kernels.newton_rnn.sweeps import Rows, forward
from rondo.kernels.tiles import whole_tensors
from rondo.tests.kernels.newton_rnn_cases import (
    BATCH,
    FUNCTIONS,
    LIMITS,
    NAMES,
    WIDTH,
    close,
    compare,
    documents,
    operands,
    run,
)
from rondo.tests.kernels.newton_rnn_cases import (
    chunks as chunks,
)
from rondo.tests.numerics import gradients as gradients_of

pytestmark = pytest.mark.quick


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
