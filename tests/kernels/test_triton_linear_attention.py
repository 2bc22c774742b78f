"""Gated linear attention by Triton kernels, in the interpreter where there is no GPU, against the
float64 reference."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from rondo.kernels.linear_attention import (
    gated_linear_attention,
    gated_linear_attention_summary,
)
from rondo.tests.kernels.test_linear_attention import Case, make
from rondo.tests.numerics import assert_ratio, gradients

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GATES = ("none", "head", "key")
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 5e-3}
pytestmark = pytest.mark.usefixtures("poisoned_memory")


def on_device(case: Case) -> Case:
    return Case(*(None if x is None else x.to(DEVICE) for x in case))


def names(case: Case) -> list[str]:
    inputs = ("q", "k", "v", "log_decay", "initial_state")
    return ["d" + name for name, x in zip(inputs, case, strict=False) if x is not None]


def check(case: Case, chunk: int = 16) -> None:
    """Outputs and all gradients against the reference in float64."""
    case = on_device(case)
    run = functools.partial(case.run, backend="triton", chunk_size=chunk, scale=0.7)
    actual = gradients(run, case.tensors())
    exact = [x.double() for x in case.tensors()]
    reference = functools.partial(case.run, backend="reference", scale=0.7)
    expected = gradients(reference, exact)
    assert [x.dtype for x in actual[0]] == [case.v.dtype, torch.float32]
    for name, x, y in zip(
        ["o", "state", *names(case)], actual[0] + actual[1], expected[0] + expected[1], strict=True
    ):
        assert_ratio(name, x, y, LIMITS[case.v.dtype])


def one_row(case: Case) -> Case:
    return Case(*(None if x is None else x[:1] for x in case))


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_matches_reference(gate: str, dtype: torch.dtype) -> None:
    if gate != "key":
        check(make(37, gate, heads=(1, 2), dims=(20, 24), dtype=dtype, documents=0.1))
    elif dtype == torch.float32:
        check(make(35, gate, heads=(1, 1), dims=(20, 24), dtype=dtype, documents=0.1), chunk=32)
    else:  # four blocks in a chunk
        check(one_row(make(50, gate, heads=(1, 1), dtype=dtype, documents=0.03)), chunk=64)


@pytest.mark.parametrize("gate", GATES)
def test_lengths_chunks_and_groups(gate: str) -> None:
    check(one_row(make(1, gate, heads=(1, 1), dtype=torch.float32)))
    case = make(18, gate, heads=(1, 2), dims=(36, 16), dtype=torch.float32, state=False)
    check(one_row(case), chunk=16 if gate == "key" else 20)


@pytest.mark.parametrize(
    "gate,value", [("head", 0.0), ("head", -50.0), ("head", -1e4), ("head", "mix"), ("key", "mix")]
)
def test_extreme_gates(gate: str, value: float | str) -> None:
    case = one_row(make(34, gate, heads=(1, 1), dims=(16, 16), dtype=torch.float32, documents=0.03))
    assert case.log_decay is not None
    log_decay = torch.full_like(case.log_decay, 0.0 if value == "mix" else value)
    if value == "mix":
        values = torch.tensor([0.0, -1e-4, -50.0, -1e4, -torch.inf])
        log_decay = values[torch.randint(5, log_decay.shape, generator=torch.manual_seed(1))]
    check(case._replace(log_decay=log_decay), chunk=32)


@pytest.mark.parametrize("gate", GATES)
def test_gradient_of_one_output_alone(gate: str) -> None:
    case = on_device(one_row(make(18, gate, heads=(1, 1), dtype=torch.float32, documents=0.05)))
    for index in (0, 1):
        grads = []
        for backend in ("triton", "reference"):
            inputs = [x.clone().requires_grad_() for x in case.tensors()]
            out = case.run(*inputs, chunk_size=16, backend=backend)[index]
            grads.append(torch.autograd.grad(out.sum(), inputs, allow_unused=True))
        for x, y in zip(*grads, strict=True):
            torch.testing.assert_close(x, torch.zeros_like(x) if y is None else y)


@pytest.mark.parametrize("gate", GATES)
def test_summary(gate: str) -> None:
    for documents in (0.0, 0.2):
        case = make(18, gate, heads=(1, 2), dtype=torch.float32, documents=documents)
        case = on_device(one_row(case))

        def summarized(*tensors: Tensor, case: Case = case) -> tuple[Tensor, ...]:
            moved = case.rebuilt(tensors)
            summary = gated_linear_attention_summary(
                moved.k, moved.v, moved.log_decay,
                segment_ids=moved.segment_ids, chunk_size=16, backend="triton",
            )  # fmt: skip
            return (summary.apply(moved.initial_state),)

        def state(*tensors: Tensor, case: Case = case) -> tuple[Tensor]:
            return (case.run(*tensors, backend="reference")[1],)

        actual = gradients(summarized, case.tensors())
        expected = gradients(state, [x.double() for x in case.tensors()])
        results = zip(actual[0] + actual[1], expected[0] + expected[1], strict=True)
        for name, (x, y) in zip(["state", *names(case)], results, strict=True):
            assert_ratio(name, x, y, 1e-5)


@pytest.mark.quick
@pytest.mark.parametrize("gate", GATES)
def test_decoding_continues_the_row(gate: str) -> None:
    case = on_device(make(6, gate, heads=(1, 2), dims=(40, 20), dtype=torch.float32))
    whole, last = case.run(backend="reference")
    state, outputs = case.initial_state, []
    with torch.no_grad():
        for t in range(6):
            q, k, v, g = (None if x is None else x[:, t : t + 1] for x in case[:4])
            o, state = gated_linear_attention(q, k, v, g, initial_state=state, backend="triton")
            outputs.append(o)
    torch.testing.assert_close(torch.cat(outputs, 1), whole)
    torch.testing.assert_close(state, last)
    with torch.no_grad():
        o, _ = gated_linear_attention(*(x[:, :1] for x in case[:3]), backend="triton")
    expected = gated_linear_attention(*(x[:, :1] for x in case[:3]), backend="reference")[0]
    torch.testing.assert_close(o, expected)


def test_strided_inputs() -> None:
    case = on_device(make(20, "head", heads=(1, 2), dtype=torch.float32, documents=0.05))
    run = functools.partial(case.run, backend="triton", chunk_size=16)
    strided = [torch.stack([x, x], dim=-1)[..., 0] for x in case.tensors()]
    for x, y in zip(run(*strided), run(), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)


def test_traces_without_graph_breaks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # a compiler makes tensors without values of its own
    case = on_device(make(18, "head", heads=(1, 1), dtype=torch.float32, documents=0.05))
    run = functools.partial(case.run, chunk_size=16, backend="triton")
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    results = [gradients(f, case.tensors()) for f in (compiled, run)]
    for x, y in zip(*(o + g for o, g in results), strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.quick
def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"it takes float32, .* got float64"):
        make(3).run(backend="triton")
    wide = make(3, "key", dims=(257, 4), dtype=torch.float32)
    with pytest.raises(ValueError, match="takes up to 256 of them, got 257"):
        wide.run(backend="triton")
