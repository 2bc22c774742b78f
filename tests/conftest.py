"""Settings that every test shares."""

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import pytest
import torch

torch.set_num_threads(1)
if not torch.cuda.is_available():
    # Triton's kernels run as numpy then; read when triton is first imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")


def every_test() -> bool:
    """Whether the slow ones run too."""
    return os.environ.get("RONDO_TESTS") == "all"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not every_test():
        skip = pytest.mark.skip(reason="slow; RONDO_TESTS=all runs it")
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(skip)


def slow_but(core: Sequence[Any], names: Iterable[Any]) -> list[Any]:
    """Parameters of a test: those not in `core` are slow."""
    return [n if n in core else pytest.param(n, marks=pytest.mark.slow) for n in names]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """Lets no test inherit compiled code: the shapes of an earlier one would turn dynamic here.

    Guards on dynamic shapes of unrolled loops take sympy minutes instead of seconds.
    """
    yield
    if "torch._dynamo.convert_frame" in sys.modules:
        torch.compiler.reset()


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fills new floating tensors without values with NaN, so that what nothing wrote shows."""

    def poisoned(make: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            x = make(*arguments, **options)
            return x.fill_(float("nan")) if x.is_floating_point() else x

        return run

    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch.Tensor, "new_empty"),
    ):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
