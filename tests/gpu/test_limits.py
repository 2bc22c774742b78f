"""The limits of bfloat16 in `test_cuda.py` are what rounding makes of these cases, on a CPU too."""

from __future__ import annotations

import pytest
import torch

from rondo.tests.gpu import test_cuda

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: test_cuda.py")


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(test_cuda, "DEVICE", "cpu")


@pytest.mark.parametrize("name", test_cuda.OPERATORS)
def test_of_operators(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunked forms stay within them, and not within a third of them."""
    test_cuda.test_operator(name, torch.bfloat16, "chunked")
    thirds = {start: limit / 3 for start, limit in test_cuda.HALF_LIMITS.items()}
    monkeypatch.setattr(test_cuda, "HALF_LIMITS", thirds)
    with pytest.raises(AssertionError, match="error ratio"):
        test_cuda.test_operator(name, torch.bfloat16, "chunked")


@pytest.mark.slow
def test_of_losses_and_norms() -> None:
    test_cuda.test_norms(2048, torch.bfloat16)
    for cap in (None, 5.0):
        test_cuda.test_cross_entropy(torch.bfloat16, cap, "sum")
