"""What is timed on a GPU, at its real shapes, without one: inputs without numbers go through all
that surrounds the kernels, forward and backward, and launches are looked at instead of run."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from rondo.kernels import backend
from rondo.kernels.bench import cases, order

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: make gpu")
META = torch.device("meta")
LOOPS = ("attention", "neural_memory")
"""Without kernels of their own for what is timed, or thousands of steps long."""
SLOW = ("linear_cross_entropy", "fast_weights")


def everywhere(monkeypatch: pytest.MonkeyPatch, name: str, value: Callable[..., Any]) -> None:
    """Replaces a function in all modules of kernels that have imported it."""
    for module in [m for n, m in sys.modules.items() if n.startswith("rondo.kernels")]:
        if name in vars(module):
            monkeypatch.setattr(module, name, value)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Kernels by name as they are launched, on what counts as a chip of 132 processors."""
    pytest.importorskip("triton")
    from triton.runtime.interpreter import InterpretedFunction

    from rondo.kernels import triton_support

    triton_support.all_compilations()  # imports all
    found: list[str] = []

    def look(kernel: Any, *given: Any, grid: Any, warmup: bool, **named: Any) -> None:
        options = {n: x for n, x in named.items() if n in kernel.arg_names}
        bound = inspect.signature(kernel.fn).bind(*given, **options).arguments
        sizes = grid(named | bound) if callable(grid) else grid
        for name, value in bound.items():
            assert not isinstance(value, Tensor) or value.device == META, (kernel.__name__, name)
        assert 0 < sizes[0] < 2**31 and all(0 < n < 2**16 for n in sizes[1:]), (kernel, sizes)
        found.append(kernel.__name__)

    def refusal(*tensors: Tensor | None) -> str | None:
        given = [x.dtype for x in tensors if x is not None and x.is_floating_point()]
        wrong = [str(dtype) for dtype in given if dtype not in backend.TRITON_DTYPES]
        return f"it takes no {wrong[0]}" if wrong else None

    best = backend._best
    monkeypatch.setattr(InterpretedFunction, "run", look)
    monkeypatch.setattr(backend, "_best", lambda name, by, _, why: best(name, by, "cuda", why))
    everywhere(monkeypatch, "triton_refusal", refusal)
    everywhere(monkeypatch, "chip_family", lambda device: "sm90")
    everywhere(monkeypatch, "resident_programs", lambda device: 4 * 132)
    return found


def check(key: order.Key) -> None:
    """A case, forward and backward: gradients are like its inputs."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        case = cases.make_case(*key, META)
        output = case.run(**case.inputs)
        assert output.device == META
        grads = torch.autograd.grad(output, list(case.inputs.values()), torch.ones_like(output))
    for grad, value in zip(grads, case.inputs.values(), strict=True):
        assert (grad.shape, grad.dtype) == (value.shape, value.dtype)


@pytest.mark.parametrize(
    "operator",
    [
        pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name
        for name in cases.OPERATORS
        if name not in LOOPS
    ],
)
def test_every_shape(operator: str, launches: list[str]) -> None:
    for key in order.ordered([operator], list(cases.PRESETS)):
        if operator == "fast_weights" and key.length > 8192:
            continue  # hundreds of chunks
        if operator.startswith("para_") and key.batch < 8:
            continue  # looks at numbers to see whether it goes on
        launches.clear()
        check(key)
        assert len(launches) > 1 or operator == "expert_products", key  # torch's own kernel


def test_a_tensor_that_is_left_on_the_cpu_is_seen(
    launches: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def forgotten(p: Any, batch: int, time: int, device: torch.device) -> Any:
        run, inputs, *flops = norm(p, batch, time, device)
        return run, inputs | {"weight": torch.ones(p.dim).requires_grad_()}, *flops

    norm = cases.OPERATORS["rms_norm"]
    monkeypatch.setitem(cases.OPERATORS, "rms_norm", forgotten)
    with pytest.raises((AssertionError, RuntimeError), match=r"weight|device"):
        check(order.Key("rms_norm", "1.3b", 2, 64))
