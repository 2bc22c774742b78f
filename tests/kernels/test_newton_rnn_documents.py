"""Newton's method over documents, cuts, stretches of ranks, and cells that are functions."""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from rondo.kernels import combine, newton_rnn
from rondo.kernels.newton_rnn import CELLS, FunctionCell
from rondo.kernels.newton_rnn.sweeps import Rows, forward
from rondo.tests.kernels.newton_rnn_cases import (
    BATCH,
    FUNCTIONS,
    LIMITS,
    NAMES,
    WIDTH,
    Stretch,
    close,
    compare,
    documents,
    operands,
    over_threads,
    run,
)
from rondo.tests.kernels.newton_rnn_cases import chunks as chunks
from rondo.tests.numerics import gradients as gradients_of

pytestmark = pytest.mark.quick


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
    with pytest.raises(ValueError, match="gates of another position"):
        newton_rnn(lambda h, g, a: torch.tanh(g[0].cumsum(1) + h), gates, weights)
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
