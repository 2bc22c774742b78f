"""The loss on Triton, in Triton's interpreter where there is no GPU, against the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from rondo.kernels.cross_entropy import linear_cross_entropy, triton
from rondo.kernels.triton_configs import CONFIGS
from rondo.tests.kernels.test_cross_entropy import REDUCTIONS, make, run
from rondo.tests.numerics import assert_ratio, gradients

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True, params=("one chunk", "chunks"))
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of all tokens and of 5, blocks that the vocabulary and the channels do not fill."""
    monkeypatch.setitem(CONFIGS, "target_logits", {"*": ({"BLOCK": 4},)})
    monkeypatch.setitem(CONFIGS, "cross_entropy_losses", {"*": ({"BLOCK": 8},)})
    if request.param == "chunks":
        monkeypatch.setattr(triton, "MIN_CHUNK", 5)
        monkeypatch.setattr(triton, "BUFFER_BYTES", 1)


def compare(
    inputs: list[Tensor], targets: Tensor, reduction: str, limits: tuple, cap: float | None = None
) -> None:
    inputs, targets = [x.to(DEVICE) for x in inputs], targets.to(DEVICE)
    exact = [x.double() for x in inputs]
    expected, expected_grads = gradients(run(targets, reduction, "reference", cap), exact)
    actual, actual_grads = gradients(run(targets, reduction, "triton", cap), inputs)
    assert actual[0].dtype == torch.float32
    assert [x.dtype for x in actual_grads] == [x.dtype for x in inputs]
    assert_ratio("loss", actual[0], expected[0], limits[0])
    for name, a, e in zip(("dhidden", "dweight"), actual_grads, expected_grads, strict=True):
        assert_ratio(name, a, e, limits[1])


@pytest.mark.quick
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", ((1,), (2, 2, 4)))
@pytest.mark.parametrize("cap", (None, 2.0))
def test_matches_reference(reduction: str, shape: tuple[int, ...], cap: float | None) -> None:
    *inputs, targets = make(*shape)
    targets.view(-1)[0] = 3
    compare([x.float() for x in inputs], targets, reduction, (1e-5, 1e-5), cap)
    compare([x.bfloat16() for x in inputs], targets, reduction, (5e-3, 8e-3), cap)


@pytest.mark.parametrize("size", (1e-6, 30.0, 1e4))
@pytest.mark.parametrize("cap", (None, 100.0))
def test_logits_of_any_size(size: float, cap: float | None) -> None:
    hidden, weight, targets = make(9)
    # Half a last digit of 100 changes a probability by 4e-6.
    limit = 1e-5 if cap is None else 4e-5
    compare([(hidden * size).float(), weight.float()], targets, "sum", (1e-5, limit), cap)


def test_weights_of_another_dtype_and_gaps() -> None:
    hidden, weight, targets = make(9, dim=12)
    compare([hidden.bfloat16()[:, ::2], weight.float()[:, ::2]], targets, "mean", (1e-2, 2e-2))
    compare([hidden.half()[:, :6], weight.float()[:, :6]], targets, "mean", (1e-5, 1e-3))


def test_a_kernel_that_works_in_place_is_not_tuned() -> None:
    """Measuring a second configuration would read gradients as logits."""
    assert all(len(rows) == 1 for rows in CONFIGS["cross_entropy_losses"].values())


def test_all_ignored_or_none_there() -> None:
    for tokens in (4, 0):
        hidden, weight, targets = make(tokens)
        inputs = [hidden.float().to(DEVICE), weight.float().to(DEVICE)]
        targets = torch.full_like(targets, -100).to(DEVICE)
        loss, grads = gradients(run(targets, "mean", "triton"), inputs)
        assert loss[0].item() == 0.0
        assert all((x == 0).all() for x in grads)


def test_no_gradient_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, targets = (x.to(DEVICE) for x in make(6))
    hidden, weight = hidden.float(), weight.float()
    monkeypatch.setattr(torch, "mm", None)  # makes gradients, and nothing else
    loss = linear_cross_entropy(hidden, weight, targets, reduction="sum", backend="triton")
    expected = linear_cross_entropy(hidden, weight, targets, reduction="sum", backend="reference")
    torch.testing.assert_close(loss, expected)


def test_traces_without_graph_breaks() -> None:
    *inputs, targets = make(6)
    inputs, targets = [x.float().to(DEVICE).requires_grad_() for x in inputs], targets.to(DEVICE)
    for reduction, cap in (("none", 2.0), ("mean", None)):
        call = run(targets, reduction, "triton", cap)
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        actual, expected = compiled(*inputs)[0], call(*inputs)[0]
        torch.testing.assert_close(actual, expected)
        grads = [torch.autograd.grad(y.sum(), inputs) for y in (actual, expected)]
        torch.testing.assert_close(*grads)


def test_refusal() -> None:
    hidden, weight, targets = make(3)
    with pytest.raises(ValueError, match=r"cannot run: it takes float32, .* got float64"):
        linear_cross_entropy(hidden, weight, targets, backend="triton")
