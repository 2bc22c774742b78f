"""Attention on a CUDA device: torch's own kernels and flash-attn pass the same tests."""

from __future__ import annotations

import pytest
import torch

from rondo.kernels import attention
from rondo.tests.kernels import attention_checks as checks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CHECKS = (
    checks.check_scale,
    checks.check_cache,
    checks.check_separate,
    checks.check_other_documents,
    checks.check_large_scores,
)


@pytest.fixture(params=["chunked", "flash"])
def backend(request: pytest.FixtureRequest) -> str:
    """Skips flash where the package is not installed."""
    if request.param == "flash":
        q = torch.zeros(1, 1, 1, 16, device="cuda", dtype=torch.bfloat16)
        try:
            attention(q, q, q, backend="flash")
        except ValueError as error:
            if "not installed" not in str(error):  # a broken installation is no reason to pass
                raise
            pytest.skip(str(error))
    return request.param


@pytest.fixture(params=[(torch.bfloat16, 1.5e-2), (torch.float16, 2e-3)], ids=["bf16", "fp16"])
def where(request: pytest.FixtureRequest, backend: str) -> checks.Where:
    """Limits are a few roundings of the type: 2^-9 and 2^-12 of a number each."""
    return checks.Where(backend, "cuda", *request.param)


@pytest.mark.parametrize("packed", (False, True))
@pytest.mark.parametrize("window", (None, 1, 3, 100))
@pytest.mark.parametrize("shape", checks.SHAPES)
@pytest.mark.parametrize("groups", (1, 2, 4))
def test_outputs_and_gradients_are_the_references(
    where: checks.Where, shape: tuple[int, int], window: int | None, packed: bool, groups: int
) -> None:
    checks.check_reference(where, shape, window, packed, groups)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_rest_of_attention(where: checks.Where, check) -> None:
    check(where)
