"""What each operator says of a backend that cannot serve a call: its own name, and why."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest

from rondo import kernels
from rondo.kernels import backend
from rondo.tests.kernels.operator_calls import CALLS, OPTIONS

pytestmark = pytest.mark.quick
WITHOUT_KERNELS = {
    "attention": "it has no Triton kernel: 'chunked' takes torch's",
    "memory_context": "no Triton kernel is written for attention to what a memory recalls",
    "mlstm": "no Triton kernel is written for its state",
}


def forced(name: str, backend: str) -> str:
    """The error of an operator on a CPU."""
    operator: Callable[..., Any] = getattr(kernels, name)
    with pytest.raises(ValueError) as error:
        operator(*CALLS[name], **OPTIONS.get(name, {}), backend=backend)
    return str(error.value)


def test_every_operator_with_a_backend_is_here() -> None:
    public = {name: getattr(kernels, name) for name in kernels.__all__}
    taking = {n for n, f in public.items() if "backend" in inspect.signature(f).parameters}
    assert taking == set(CALLS)


@pytest.mark.parametrize("name", CALLS)
def test_triton_on_a_cpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(backend, "_interprets", lambda: False)
    expected = "needs CUDA tensors, got cpu; on a CPU it runs in its interpreter only"
    if name in WITHOUT_KERNELS:
        expected = f"cannot run: {WITHOUT_KERNELS[name]}"
    assert forced(name, "triton").startswith(f"{name}: backend 'triton' {expected}")


@pytest.mark.parametrize("name", CALLS)
def test_a_backend_that_nobody_has(name: str) -> None:
    message = forced(name, "chunks")
    assert message.startswith(f"{name}: backend 'chunks' is not available; choose one of auto, ")
    assert ("chunked" in message and "reference" in message) or name.endswith("summary")
