"""The Triton passes of neural memory, in the interpreter where there is no GPU, against the
reference."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from rondo.kernels import neural_memory
from rondo.kernels.neural_memory import MemoryState, chunk, triton
from rondo.kernels.triton_configs import CONFIGS
from rondo.tests.kernels.test_neural_memory import documents, operands, run
from rondo.tests.numerics import assert_ratio, gradients

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
pytestmark = [pytest.mark.quick, pytest.mark.usefixtures("poisoned_memory")]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles of a layer of 20 x 18, the last of each kind not full."""
    monkeypatch.setitem(CONFIGS, "memory_advance", {"*": ({"BK": 16, "BV": 16, "TOKENS": 16},)})
    for name in ("memory_scale", "memory_advance_backward"):
        monkeypatch.setitem(CONFIGS, name, {"*": ({"BLOCK": 16},)})


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_matches_reference(dtype: torch.dtype) -> None:
    """Outputs, states and every gradient, with documents, a state and both limits, against the
    float64 reference of the same numbers."""
    inputs = operands(9)
    first = neural_memory(*operands(3, seed=4)[:6], tuple(inputs[6:]), chunk_size=4).state
    inputs = [x.to(DEVICE, torch.float32) for x in (first.values, *inputs)]
    inputs[1:4] = [x.to(dtype) for x in inputs[1:4]]
    done, ids = first.done.to(DEVICE), documents(9).to(DEVICE)

    def of(values: Tensor, *x: Tensor, backend: str) -> list[Tensor]:
        options: dict[str, Any] = {"chunk_size": 4, "max_update": 0.8, "max_weight": 1.5}
        state = MemoryState(values, done)
        return run(*x, initial_state=state, segment_ids=ids, backend=backend, **options)

    found = gradients(functools.partial(of, backend="triton"), inputs)
    exact = [x.double() for x in inputs]
    expected = gradients(functools.partial(of, backend="reference"), exact)
    assert [x.dtype for x in found[0]] == [dtype, torch.float32]
    for number, (x, y) in enumerate(
        zip(found[0] + found[1], expected[0] + expected[1], strict=True)
    ):
        assert_ratio(f"result {number}", x, y, LIMITS[dtype])


def draw(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=generator).to(DEVICE) for shape in shapes]


@pytest.mark.parametrize("tokens", (1, 17))
def test_a_step_of_a_layer(tokens: int) -> None:
    """Also for chunks longer than a tile of tokens."""
    state, *given = draw((3, 40, 18), (3, 3), (3, tokens, 40), (3, tokens, 18))
    found, expected = torch.empty_like(state), torch.empty_like(state)
    triton.advance(state, *given, found)
    chunk.advance(state, *given, expected)
    torch.testing.assert_close(found, expected)


def test_the_way_back_through_a_step() -> None:
    state, carried, to_out, to_state = draw((3, 10, 6), (3, 3), (3, 10, 6), (3, 10, 6))
    other = to_state.clone()
    found = triton.advance_backward(state, carried, to_out, to_state)
    torch.testing.assert_close(found, chunk.advance_backward(state, carried, to_out, other))
    torch.testing.assert_close(to_state, other)


def test_scales() -> None:
    """Also of 1, and of 0 where a norm has overflown."""
    (state,) = draw((3, 10, 6))
    scales = torch.tensor([[1.0, 0.5], [0.0, 1.0], [0.25, 2.0]], device=DEVICE)
    expected = state.clone()
    triton.scale(state, scales)
    chunk.scale(expected, scales)
    torch.testing.assert_close(state, expected, rtol=0, atol=0)


def test_refusal() -> None:
    with pytest.raises(ValueError, match=r"it takes float32, .* got float64"):
        run(*operands(2), backend="triton")
