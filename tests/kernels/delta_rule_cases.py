"""Arguments of the gated delta rule, and its chunked form against the reference."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, normalize

from rondo.kernels.delta_rule import gated_delta_rule
from rondo.tests.numerics import assert_ratio, gradients

GATES = ("none", "head", "key")
EXTREMES = (0.0, -1e-4, -50.0, -1e4)
"""Logarithms of decays a token, from none to all."""


def make(
    time: int,
    gate: str = "head",
    *,
    batch: int = 2,
    groups: int = 2,
    heads: int = 2,
    key: int = 16,
    value: int = 8,
    beta: tuple[float, float] = (0.0, 1.0),
    seed: int = 0,
) -> dict[str, Tensor | None]:
    """Random float64 arguments with unit queries and keys."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    gates = {"none": None, "head": (batch, time, heads), "key": (batch, time, heads, key)}
    shape = gates[gate]
    low, high = beta
    return {
        "q": normalize(normal(batch, time, groups, key), dim=-1),
        "k": normalize(normal(batch, time, groups, key), dim=-1),
        "v": normal(batch, time, heads, value),
        "beta": low + (high - low) * normal(batch, time, heads).sigmoid(),
        "log_decay": None if shape is None else logsigmoid(normal(*shape) + 1),
        "initial_state": normal(batch, heads, key, value),
    }


def cast(args: dict[str, Tensor | None], dtype: torch.dtype) -> dict[str, Tensor | None]:
    """q, k, v to `dtype`, the rest to what is accumulated in."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return {
        name: None if x is None else x.to(dtype if name in "qkv" else wide)
        for name, x in args.items()
    }


def cut(args: dict[str, Tensor | None], start: int, end: int, **changes) -> dict:
    """The arguments of positions `start` to `end`."""
    part = {n: x if x is None or n == "initial_state" else x[:, start:end] for n, x in args.items()}
    return part | changes


def run_with_gradients(args: dict[str, Tensor | None], **options) -> dict[str, Tensor]:
    """Outputs, and the gradients of all arguments for random gradients of both outputs."""
    given = {name: x for name, x in args.items() if x is not None}

    def function(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return gated_delta_rule(**dict(zip(given, tensors, strict=True)), **options)

    outputs, grads = gradients(function, list(given.values()))
    return dict(zip(("o", "state", *(f"d_{n}" for n in given)), (*outputs, *grads), strict=True))


def assert_same(
    actual: dict[str, Tensor], expected: dict[str, Tensor], limit: float, gradient_limit: float = 0
) -> None:
    for name, x in expected.items():
        allowed = max(limit, gradient_limit) if name.startswith("d_") else limit
        assert_ratio(name, actual[name], x, allowed)


def compare(
    args: dict[str, Tensor | None],
    dtype: torch.dtype,
    limit: float,
    gradient_limit: float = 0,
    **options,
) -> None:
    """Chunked backend in `dtype` against the reference in float64 on the same rounded inputs."""
    rounded = cast(args, dtype)
    chunked = run_with_gradients(rounded, backend="chunked", **options)
    reference = run_with_gradients(cast(rounded, torch.float64), backend="reference", **options)
    assert chunked["o"].dtype == dtype
    assert_same(chunked, reference, limit, gradient_limit)
