"""The Triton passes of Newton's method over time, in the interpreter where there is no GPU, against
the loop of the reference."""

from __future__ import annotations

import functools
import threading
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from rondo.kernels import newton_rnn
from rondo.kernels.newton_rnn import CELLS, chunked, sweeps, triton
from rondo.kernels.newton_rnn.sweeps import Rows
from rondo.kernels.triton_configs import CONFIGS
from rondo.tests.kernels.newton_rnn_cases import (
    BATCH,
    FUNCTIONS,
    LIMITS,
    NAMES,
    Stretch,
    compare,
    documents,
    operands,
    over_threads,
    run,
)
from rondo.tests.numerics import gradients

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks of channels, the last one not full, and several chunks."""
    for name in ("newton_sweep", "newton_pull", "newton_borders"):
        monkeypatch.setitem(CONFIGS, name, {"*": ({"BLOCK": 2},)})
    monkeypatch.setattr(triton, "LEAST", 5)


def check(name: str, dtype: torch.dtype, time: int, packed: bool) -> None:
    """Outputs, states and every gradient against the float64 reference of the same numbers."""
    inputs = [x.to(DEVICE) for x in operands(name, time, dtype)]
    ids = documents(time).to(DEVICE) if packed else None
    found, expected = (
        gradients(functools.partial(run, cell=name, segment_ids=ids, backend=b), x)
        for b, x in (("triton", inputs), ("reference", [x.double() for x in inputs]))
    )
    assert (found[0][0].dtype, found[0][1].dtype) == (dtype, torch.float32)
    assert [x.dtype for x in found[1]] == [x.dtype for x in inputs]
    compare(found, expected, LIMITS[dtype])


@pytest.mark.quick
@pytest.mark.parametrize("name", NAMES)
def test_matches_reference(name: str) -> None:
    check(name, torch.float32, 13, packed=True)
    check(name, torch.bfloat16, 4, packed=False)  # one chunk


@pytest.mark.parametrize("name", NAMES)
def test_one_gradient_at_a_time(name: str) -> None:
    inputs = [x.to(DEVICE).requires_grad_() for x in operands(name, 6, torch.float32)]
    for index in range(2):
        found, expected = (
            torch.autograd.grad(run(*inputs, name, backend=b)[index].sum(), inputs)
            for b in ("triton", "chunked")
        )
        for x, y in zip(found, expected, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


@pytest.mark.quick
@pytest.mark.parametrize("name", NAMES)
def test_a_sweep(name: str) -> None:
    """States, ends and products of Jacobians, which a solution does not show: wrong ones only cost
    iterations."""
    gates, weights, bias, _ = (x.to(DEVICE) for x in operands(name, 7, torch.float32))
    starts = (torch.arange(7, device=DEVICE) == 3).expand(BATCH, -1).unsqueeze(-1)
    borders = torch.linspace(-1, 1, 2 * BATCH * CELLS[name].variables * 3).to(DEVICE)
    borders = borders.view(CELLS[name].variables, BATCH, 2, 3)
    rows = Rows(CELLS[name], gates, weights, bias, starts, 4)
    for each in (rows, rows._replace(starts=None)):
        found, expected = triton.forward(each, borders, True), sweeps.forward(each, borders, True)
        for x, y in zip(found, expected, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


def test_failure_is_counted_and_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the passes find is judged as in the chunked form, and a row done in one chunk at last
    has its gradient in chunks all the same."""
    monkeypatch.setattr(chunked, "chunk_size", lambda *_: 5)
    inputs = [x.to(DEVICE) for x in operands("para_gru", 11, torch.float32, scale=4.0)]
    options: dict[str, Any] = {"iterations": 1, "max_iterations": 1, "cell": "para_gru"}
    found, expected = (
        gradients(functools.partial(run, backend=b, **options), inputs)
        for b in ("triton", "chunked")
    )
    compare(found, expected, 1e-4)
    gates, weights, bias, state = inputs
    options |= {"gates": gates, "recurrent": weights, "bias": bias, "initial_state": state}
    health, other = (newton_rnn(backend=b, **options).health for b in ("triton", "chunked"))
    assert health.sequential == 1
    torch.testing.assert_close(health, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_stretches_equal_whole_rows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    time = 13
    inputs = [x.to(DEVICE) for x in operands(name, time, torch.float32)]
    gates, weights, bias, state = inputs
    ids = (torch.arange(time, device=DEVICE) >= 9).long().expand(BATCH, -1)
    expected = gradients(functools.partial(run, cell=name, segment_ids=ids), inputs)
    (at_h, at_state) = (
        torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)
        for generator in [torch.Generator().manual_seed(0)]
        for x in expected[0]
    )
    one_at_a_time, start = threading.Lock(), triton._launch

    def launch(*arguments: Any) -> None:
        with one_at_a_time:  # the interpreter has one place for the number of a program
            start(*arguments)

    monkeypatch.setattr(triton, "_launch", launch)

    def work(rank: int, neighbours: Stretch) -> tuple[Any, tuple[Tensor, ...]]:
        part, own, grad = (x.tensor_split(2, 1)[rank] for x in (gates, ids, at_h))
        leaves = [x.clone().requires_grad_() for x in (part, weights, bias, state)]
        options: dict[str, Any] = {"segment_ids": own, "neighbours": neighbours}
        outputs = run(*leaves, name, backend="triton", **options)
        return outputs, torch.autograd.grad(outputs, leaves, (grad, at_state))

    results = over_threads(2, ids, work)
    close = functools.partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)
    close(torch.cat([outputs[0] for outputs, _ in results], 1), expected[0][0])
    close(results[-1][0][1], expected[0][1])
    close(torch.cat([grads[0] for _, grads in results], 1), expected[1][0])
    for i in (1, 2):
        close(results[0][1][i] + results[1][1][i], expected[1][i])
    close(results[0][1][3], expected[1][3])


@pytest.mark.quick
def test_refusals() -> None:
    gates, weights, _, _ = operands("para_gru", 5, torch.float32)
    with pytest.raises(ValueError, match="cannot run: it has cells by name, not functions"):
        newton_rnn(FUNCTIONS["para_gru"], gates, weights, backend="triton")
    with pytest.raises(ValueError, match=r"it takes float32, .* got float64"):
        newton_rnn("para_gru", gates.double(), weights, backend="triton")


@pytest.mark.quick
def test_chunks_fill_the_chip() -> None:
    """Short ones where rows are few, longer ones where they are long, none where rows are many."""
    assert triton.chunk_size(1, 4, 8) == 4
    assert triton.chunk_size(1, 2**12, 2**10) == 64
    assert triton.chunk_size(16, 2**12, 2**10) == 2**12
