"""linear_cross_entropy against the dense loss: values, gradients, memory, bad targets."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rondo.kernels.cross_entropy import chunked, linear_cross_entropy
from rondo.tests.numerics import assert_ratio, gradients

REDUCTIONS = ("none", "sum", "mean")


@pytest.fixture(params=["usual", "small", "small and not kept"])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The usual chunks, and chunks of 5 tokens with the exponentials of 2 at a time."""
    if request.param != "usual":
        monkeypatch.setattr(chunked, "MIN_CHUNK", 5)
        monkeypatch.setattr(chunked, "BUFFER_BYTES", 1)
        monkeypatch.setattr(chunked, "SCRATCH_BYTES", 2 * 17 * 8)
    if request.param == "small and not kept":
        monkeypatch.setattr(chunked, "KEPT_BYTES", 1)


def make(*shape: int, dim: int = 6, vocabulary: int = 17, seed: int = 1) -> list[Tensor]:
    """hidden, weight in float64 and targets, some ignored."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(*shape, dim, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocabulary, dim, generator=generator, dtype=torch.float64)
    targets = torch.randint(vocabulary, shape, generator=generator)
    targets[torch.rand(shape, generator=generator) < 0.2] = -100
    return [hidden, weight, targets]


def run(targets: Tensor, reduction: str, backend: str = "chunked", cap: float | None = None):
    return lambda hidden, weight: [
        linear_cross_entropy(
            hidden, weight, targets, reduction=reduction, logit_cap=cap, backend=backend
        )
    ]


def dense(targets: Tensor, reduction: str, cap: float | None = None):
    def loss(hidden: Tensor, weight: Tensor) -> list[Tensor]:
        logits = (hidden @ weight.T).flatten(0, -2)
        if cap is not None:
            logits = cap * torch.tanh(logits / cap)
        losses = F.cross_entropy(logits, targets.flatten(), reduction=reduction)
        return [losses.view(targets.shape) if reduction == "none" else losses]

    return loss


@pytest.mark.parametrize("backend", ("reference", "chunked"))
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", ((1,), (3, 9), (2, 2, 4)))
@pytest.mark.parametrize("cap", (None, 2.0))
def test_matches_dense(
    chunk: None, backend: str, reduction: str, shape: tuple[int, ...], cap: float | None
) -> None:
    *inputs, targets = make(*shape)
    targets.view(-1)[0] = 3
    expected, expected_grads = gradients(dense(targets, reduction, cap), inputs)
    actual, actual_grads = gradients(run(targets, reduction, backend, cap), inputs)
    torch.testing.assert_close(actual + actual_grads, expected + expected_grads)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("cap", (None, 1.5))
def test_gradcheck(chunk: None, reduction: str, cap: float | None) -> None:
    *inputs, targets = make(7, dim=3)
    function = run(targets, reduction, cap=cap)
    inputs = [x.requires_grad_() for x in inputs]
    torch.autograd.gradcheck(function, inputs, check_undefined_grad=False)


@pytest.mark.parametrize("backend", ("reference", "chunked"))
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_all_ignored_is_zero(backend: str, reduction: str) -> None:
    *inputs, targets = make(2, 5)
    outputs, grads = gradients(run(torch.full_like(targets, -100), reduction, backend), inputs)
    assert all(torch.equal(y, torch.zeros_like(y)) for y in outputs + grads)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_ignore_index_can_be_a_token(reduction: str) -> None:
    hidden, weight, targets = make(30)
    targets = targets.clamp(min=0)
    actual = linear_cross_entropy(hidden, weight, targets, ignore_index=0, reduction=reduction)
    expected = F.cross_entropy(hidden @ weight.T, targets, ignore_index=0, reduction=reduction)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("confident", (False, True))
@pytest.mark.parametrize("cap", (None, 15.0))
@pytest.mark.parametrize("reduction", ("none", "sum"))
@pytest.mark.parametrize(
    "dtype,limits", [(torch.float32, (1e-5, 1e-5)), (torch.bfloat16, (2e-4, 5e-3))]
)
def test_low_precision(
    dtype: torch.dtype,
    limits: tuple[float, float],
    reduction: str,
    cap: float | None,
    confident: bool,
) -> None:
    """A model at its start, and a confident one with logits of 8 and more, where rounding them
    to bfloat16 would cost several percent."""
    hidden, weight, targets = make(600, dim=64, vocabulary=500)
    hidden, weight = hidden.mul(1 if confident else 0.2).to(dtype), weight.to(dtype)
    if confident:
        targets = (hidden.float() @ weight.float().T).argmax(dim=1)
    expected, expected_grads = gradients(
        dense(targets, reduction, cap), [hidden.double(), weight.double()]
    )
    actual, actual_grads = gradients(run(targets, reduction, cap=cap), [hidden, weight])
    assert actual[0].dtype == torch.float32
    assert_ratio("loss", actual[0], expected[0], limits[0] if reduction == "sum" else 1e-2)
    for name, a, e in zip(("hidden", "weight"), actual_grads, expected_grads, strict=True):
        assert a.dtype == dtype
        assert_ratio(name, a, e, limits[1])


@pytest.mark.parametrize("reduction", ("none", "sum"))
def test_float32_weight_with_bfloat16_hidden(reduction: str) -> None:
    hidden, weight, targets = make(50)
    inputs = [hidden.bfloat16(), weight.bfloat16().float()]
    _, expected = gradients(dense(targets, reduction), [x.double() for x in inputs])
    _, actual = gradients(run(targets, reduction), inputs)
    assert [x.dtype for x in actual] == [torch.bfloat16, torch.float32]
    for a, e in zip(actual, expected, strict=True):
        assert_ratio("gradient", a, e, 8e-3)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("cap", (None, 30.0))
def test_huge_logits_stay_finite(dtype: torch.dtype, reduction: str, cap: float | None) -> None:
    hidden, weight, targets = make(40)
    inputs = [(hidden * 1e4).to(dtype), (weight * 1e4).to(dtype)]
    outputs, grads = gradients(run(targets, reduction, cap=cap), inputs)
    assert all(y.isfinite().all() for y in outputs + grads)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_a_cap_bounds_the_loss(dtype: torch.dtype) -> None:
    """Logits of 1e4: with a cap of 30 each is 30 or -30, and no loss above 60 + log 17."""
    hidden, weight, targets = make(40)
    inputs = [(hidden * 1e4).to(dtype), weight.to(dtype)]
    losses = run(targets, "none", cap=30.0)(*inputs)[0]
    expected = dense(targets, "none", 30.0)(*[x.double() for x in inputs])[0]
    assert_ratio("loss", losses, expected, 1e-6 if dtype == torch.float32 else 1e-3)
    assert 50 < losses.amax() < 63


@pytest.mark.parametrize("reduction", ("sum", "mean"))
def test_without_gradients(reduction: str) -> None:
    hidden, weight, targets = make(20)
    expected = run(targets, reduction)(hidden.requires_grad_(), weight)[0].detach()
    with torch.no_grad():
        assert torch.equal(run(targets, reduction)(hidden, weight)[0], expected)
    only_hidden = torch.autograd.grad(run(targets, reduction)(hidden, weight)[0], hidden)[0]
    assert only_hidden.abs().sum() > 0


@pytest.mark.parametrize("looks", (True, False))
@pytest.mark.parametrize("cap", (None, 200.0))
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16, torch.float16))
def test_logits_far_above_the_target(
    chunk: None,
    dtype: torch.dtype,
    cap: float | None,
    looks: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Differences up to 300: sums of their exponentials fit no float32. Whether values may be
    looked at (not on a GPU) changes nothing."""
    if not looks:
        monkeypatch.setattr(chunked, "_can_look_at", lambda x: False)
    hidden, weight, targets = make(40)
    inputs = [hidden.mul(30).to(dtype), weight.to(dtype)]
    exact = [x.double() for x in inputs]
    expected, expected_grads = gradients(dense(targets, "mean", cap), exact)
    actual, actual_grads = gradients(run(targets, "mean", cap=cap), inputs)
    assert (inputs[0].double() @ inputs[1].double().T).amax() > 150
    # A cap of 200 leaves exponents of up to 288 in base 2, with an ulp of 3e-5.
    narrow = 1e-6 if cap is None else 2e-6
    limit = {torch.float64: 1e-12, torch.float32: narrow}.get(dtype, 2e-2)
    for a, e in zip(actual + actual_grads, expected + expected_grads, strict=True):
        assert_ratio("loss or gradient", a, e, limit)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("cap", (None, 2.0))
def test_traces_without_graph_breaks(reduction: str, cap: float | None) -> None:
    torch.compiler.reset()
    *inputs, targets = make(2, 9)
    inputs = [x.requires_grad_() for x in inputs]
    function = run(targets, reduction, cap=cap)
    expected = function(*inputs)[0]
    actual = torch.compile(function, fullgraph=True, backend="aot_eager")(*inputs)[0]
    grads = [torch.autograd.grad(y.square().sum(), inputs) for y in (actual, expected)]
    torch.testing.assert_close((actual, *grads[0]), (expected, *grads[1]))


def test_runs_on_fake_tensors() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        hidden, weight = (torch.randn(n, 4, requires_grad=True) for n in (5, 9))
        loss = linear_cross_entropy(hidden, weight, torch.randint(9, (5,)), reduction="mean")
        loss.backward()
    assert loss.shape == () and weight.grad is not None and weight.grad.shape == (9, 4)


PEAK = """
import re, torch
import torch.nn.functional as F
from rondo.kernels.cross_entropy import linear_cross_entropy
torch.set_num_threads(1)
tokens, vocabulary = 8192, 32768
kinds = {"mean": tokens, "none": tokens, "dense": tokens // 8}
hidden = torch.randn(tokens, 256, dtype=torch.bfloat16, requires_grad=True)
weight = torch.randn(vocabulary, 256, dtype=torch.bfloat16, requires_grad=True)
targets = torch.randint(vocabulary, (tokens,))
def high_water():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
def step(n, v, kind):
    h, w, t = hidden[:n], weight[:v], targets[:n] % v
    if kind == "dense":
        F.cross_entropy(h @ w.T, t).backward()
    else:
        linear_cross_entropy(h, w, t, reduction=kind).sum().backward()
    hidden.grad = weight.grad = None
for kind in kinds:
    step(8, 64, kind)  # loads the libraries
print(high_water())
for kind, count in kinds.items():
    step(count, vocabulary, kind)
    print(high_water())
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_memory_at_8k_tokens_and_32k_vocabulary() -> None:
    """The peak of a fresh process rises by less than with the dense loss of an eighth of the
    tokens, whose memory is proportional to them."""
    # Large buffers go back to the system when freed, so that the peak is what was in use at once.
    environment = {
        "PYTHONPATH": str(Path(__file__).parents[2] / ".typing"),
        "MALLOC_MMAP_THRESHOLD_": "131072",
    }
    command = [sys.executable, "-c", PEAK]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    before, mean, none, dense = map(int, done.stdout.split())
    assert before < mean <= none < dense


@pytest.mark.parametrize("backend", ("reference", "chunked"))
def test_targets_outside_the_vocabulary(backend: str) -> None:
    hidden, weight, targets = make(4, 5)
    for value in (17, -1, 2**40):
        targets[2, 3] = value
        with pytest.raises(ValueError, match=f"target {value} is outside the vocabulary of 17"):
            linear_cross_entropy(hidden, weight, targets, backend=backend)


@pytest.mark.parametrize(
    "change,message",
    [
        ({"weight": torch.zeros(17, 5)}, r"hidden \(3, 6\).*weight \(17, 5\)"),
        ({"targets": torch.zeros(4, dtype=torch.int64)}, r"targets \(4,\) must be \(3,\)"),
        ({"targets": torch.zeros(3, dtype=torch.int32)}, "must be int64, got torch.int32"),
        ({"reduction": "max"}, "one of none, sum, mean, got 'max'"),
        ({"backend": "flash"}, "backend 'flash' is not available"),
        ({"logit_cap": 0.0}, r"logit_cap must be a finite number above 0, or None, got 0\.0"),
        ({"logit_cap": -30.0}, r"logit_cap must be .* got -30\.0"),
        ({"logit_cap": float("nan")}, "logit_cap must be .* got nan"),
        ({"logit_cap": float("inf")}, "logit_cap must be .* got inf"),
    ],
)
def test_invalid_inputs(change: dict[str, object], message: str) -> None:
    hidden, weight, targets = make(3)
    arguments = {"hidden": hidden, "weight": weight, "targets": targets.clamp(min=0)} | change
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**arguments)
