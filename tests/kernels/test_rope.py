"""Rotary embedding against rotation of complex numbers."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch
from torch import Tensor

from rondo.kernels.rope import RopeScaling, rope, rope_table, rotate
from rondo.tests.numerics import assert_ratio, gradients


def make(dims: int = 8, time: int = 11, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, time, 3, dims, generator=generator, dtype=torch.float64)
    return x, torch.stack((torch.arange(time), torch.arange(time) + 100))


def complex_rope(x: Tensor, positions: Tensor, theta: float, dims: int) -> Tensor:
    """The same by multiplication with `exp(i * angle)`."""
    half = dims // 2
    pairs = torch.complex(x[..., :half], x[..., half:dims])
    frequencies = torch.tensor([theta ** (-2 * i / dims) for i in range(half)], dtype=x.dtype)
    angles = positions[..., None, None].to(x.dtype) * frequencies
    turned = pairs * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((turned.real, turned.imag, x[..., dims:]), dim=-1)


@pytest.mark.parametrize("dims", (None, 2, 4, 8))
@pytest.mark.parametrize("theta", (10000.0, 50.0))
def test_matches_complex_rotation(dims: int | None, theta: float) -> None:
    x, positions = make()
    expected, expected_grads = gradients(
        lambda x: [complex_rope(x, positions, theta, dims or 8)], [x]
    )
    actual, actual_grads = gradients(lambda x: [rope(x, positions, theta=theta, dims=dims)], [x])
    torch.testing.assert_close(actual + actual_grads, expected + expected_grads)
    torch.autograd.gradcheck(
        lambda x: rope(x, positions[:, :2], theta=theta, dims=dims), x[:, :2].requires_grad_()
    )


@pytest.mark.parametrize("dtype,limit", [(torch.float32, 1e-5), (torch.bfloat16, 3e-3)])
def test_low_precision(dtype: torch.dtype, limit: float) -> None:
    x, positions = make(64, time=130)
    x = x.to(dtype)
    expected, expected_grads = gradients(
        lambda x: [complex_rope(x, positions, 10000.0, 64)], [x.double()]
    )
    actual, actual_grads = gradients(lambda x: [rope(x, positions)], [x])
    assert actual[0].dtype == actual_grads[0].dtype == dtype
    assert_ratio("y", actual[0], expected[0], limit)
    assert_ratio("dx", actual_grads[0], expected_grads[0], limit)


def test_matches_llama_layout() -> None:
    modeling = pytest.importorskip("transformers.models.llama.modeling_llama")
    x, positions = make(16)
    cos, sin = (z[:, :, 0] for z in rope_table(positions, 16, dtype=torch.float64))
    sin = torch.cat((-sin[..., :8], sin[..., 8:]), dim=-1)
    expected, _ = modeling.apply_rotary_pos_emb(x, x, cos, sin, unsqueeze_dim=2)
    torch.testing.assert_close(rope(x, positions), expected)


def test_scaled_frequencies_are_llamas() -> None:
    """At the sizes of Llama 3.1: pairs that stay, pairs between, pairs slowed by all of 8."""
    utils = pytest.importorskip("transformers.modeling_rope_utils")
    config = pytest.importorskip("transformers").LlamaConfig(
        head_dim=128,
        max_position_embeddings=131072,
        rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **asdict(RopeScaling())},
    )
    expected, _ = utils.ROPE_INIT_FUNCTIONS["llama3"](config)
    plain = 5e5 ** (-torch.arange(0, 128, 2, dtype=torch.float64) / 128)
    found = RopeScaling().scale(plain)
    torch.testing.assert_close(found, expected.double(), rtol=1e-5, atol=0)
    kinds = [(found == plain).sum(), (found == plain / 8).sum()]
    assert all(kinds) and sum(kinds) < 64
    _, positions = make()
    cos, _ = rope_table(positions, 128, theta=5e5, scaling=RopeScaling(), dtype=torch.float64)
    torch.testing.assert_close(cos[1, 5, 0, :64], (105 * found).cos())


def test_scores_depend_on_distance_only() -> None:
    x, positions = make()
    shifted = positions + 37
    scores = [torch.einsum("bthd,bshd->bhts", rope(x, p), rope(x, p)) for p in (positions, shifted)]
    torch.testing.assert_close(*scores)


def test_one_row_of_positions() -> None:
    x, positions = make()
    row = positions[1:].expand(2, -1)
    assert rope_table(row, 8)[0].shape[0] == 1
    expected, actual = (gradients(lambda x, p=p: [rope(x, p)], [x]) for p in (row.clone(), row))
    assert torch.equal(expected[0][0], actual[0][0])
    assert torch.equal(expected[1][0], actual[1][0])


def test_shared_table() -> None:
    x, positions = make()
    table = rope_table(positions, 8, dtype=torch.float64)
    assert torch.equal(rotate(x, *table), rope(x, positions))


def test_traces_without_graph_breaks() -> None:
    x, positions = make()
    x.requires_grad_()
    compiled = torch.compile(rope, fullgraph=True, backend="aot_eager")
    grads = [torch.autograd.grad(f(x, positions).square().sum(), x) for f in (compiled, rope)]
    torch.testing.assert_close(*grads)


def test_invalid_inputs() -> None:
    x, positions = make()
    with pytest.raises(ValueError, match=r"positions \(2, 10\)"):
        rope(x, positions[:, :10])
    for dims in (0, 3, 10):
        with pytest.raises(ValueError, match=f"dims must be even, from 2 to 8, got {dims}"):
            rope(x, positions, dims=dims)
    with pytest.raises(ValueError, match="theta must be positive, got nan"):
        rope(x, positions, theta=float("nan"))
