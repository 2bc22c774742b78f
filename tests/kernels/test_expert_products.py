"""Which products of experts torch's grouped one takes, and what the log says of the others."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses import FakeTensorMode

from rondo.kernels import backend
from rondo.kernels.expert_products import refusal, rows_times, served

pytestmark = pytest.mark.quick


def test_what_a_grouped_product_refuses_on_a_gpu() -> None:
    """The preset `rmoe-0.9b` over two tensor-parallel ranks has 172 inner channels a rank."""
    for device, width, reason in (
        ("cuda", 172, "rows of 172 channels are no multiple of 8"),
        ("cuda", 176, None),
        ("cpu", 172, None),
    ):
        with FakeTensorMode():
            x, weight = (
                torch.empty(*shape, device=device) for shape in ((4, width), (2, width, 64))
            )
            assert refusal(x.bfloat16(), weight.bfloat16()) == reason
    x = torch.empty(4, 176)
    assert refusal(x.double(), x.double()[None]) == "torch.float64 is not bfloat16"


def test_the_log_says_why_experts_run_in_a_loop_on_a_gpu(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "_logged", {})
    with caplog.at_level("INFO"), FakeTensorMode():
        for _ in range(2):
            x, weight = (torch.empty(*s, device="cuda") for s in ((4, 172), (2, 172, 64)))
            assert not served(x.bfloat16(), weight.bfloat16())
    [line] = caplog.messages
    assert "experts runs on backend loop (rows of 172 channels" in line


@pytest.mark.parametrize(
    ("dtype", "said"),
    [
        (torch.bfloat16, "grouped_mm (torch's own product takes them)"),
        (torch.float32, "loop (torch.float32 is not bfloat16, all that it compiles for)"),
    ],
    ids=str,
)
def test_the_log_says_what_compiled_products_run_on(
    dtype: torch.dtype,
    said: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(backend, "_logged", {})
    compiled = torch.compile(rows_times, backend="eager", fullgraph=dtype == torch.bfloat16)
    ends = torch.tensor([2, 3, 3, 8], dtype=torch.int32)
    with caplog.at_level("INFO", backend.logger.name):
        for rows in (8, 9):  # compiled again for another length
            x, weight = torch.ones(rows, 16, dtype=dtype), torch.ones(4, 16, 24, dtype=dtype)
            compiled(x, weight, torch.cat([ends[:3], torch.tensor([rows], dtype=torch.int32)]))
    assert caplog.messages == [f"experts runs on backend {said}"]
