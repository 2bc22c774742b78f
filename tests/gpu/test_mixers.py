"""On a CUDA device: every mixer passes the conformance suite, in float64 by torch's operators and
in float32 by the Triton kernels."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from rondo.tests.mixer_suite import CHECKS, Case
from rondo.tests.models.test_mixers import CASES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_mixer(case: Case, check, dtype: torch.dtype) -> None:
    check(dataclasses.replace(case, device="cuda", dtype=dtype))
