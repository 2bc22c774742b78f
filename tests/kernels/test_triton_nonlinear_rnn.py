"""The Triton loops over time, in the interpreter where there is no GPU, against the reference."""

from __future__ import annotations

import itertools

import pytest
import torch

pytest.importorskip("triton")

from rondo.kernels import nonlinear_rnn, triton_support
from rondo.kernels.nonlinear_rnn import CELLS
from rondo.tests.kernels.test_nonlinear_rnn import (
    BATCH,
    HEADS,
    compare,
    documents,
    draw,
    operands,
    run,
)
from rondo.tests.numerics import gradients

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Gates, weights: what is fed back is not rounded, only outputs and gradients of bfloat16 are.
DTYPES = {
    "float32": (torch.float32, torch.float32, 1e-5),
    "bfloat16": (torch.bfloat16, torch.bfloat16, 5e-3),
    "mixed": (torch.bfloat16, torch.float32, 5e-3),
    "float16": (torch.float16, torch.float16, 1e-3),
}
pytestmark = pytest.mark.usefixtures("poisoned_memory")


def check(
    name: str,
    dtypes: str,
    time: int,
    dim: int,
    packed: bool,
    heads: int = HEADS,
    batch: int = BATCH,
) -> None:
    """Outputs, states and every gradient against the float64 reference of the same numbers."""
    kind, weights, limit = DTYPES[dtypes]
    gates, recurrent, *others = operands(name, time, heads, dim, batch)
    recurrent = recurrent * (4 / dim) ** 0.5
    inputs = [gates.to(kind), recurrent.to(weights), *(x.float() for x in others)]
    inputs = [x.to(DEVICE) for x in inputs]
    ids = documents(time).to(DEVICE) if packed else None
    expected = gradients(
        run(name, segment_ids=ids, backend="reference"), [x.double() for x in inputs]
    )
    found = gradients(run(name, segment_ids=ids, backend="triton"), inputs)
    assert [x.dtype for x in found[0]] == [kind, torch.float32]
    assert [x.dtype for x in found[1]] == [x.dtype for x in inputs]
    compare(found, expected, limit)


@pytest.mark.quick
@pytest.mark.parametrize("name", CELLS)
def test_matches_reference(name: str) -> None:
    check(name, "float32", 5, 20, packed=True)
    check(name, "bfloat16", 4, 16, packed=True)


@pytest.mark.quick
@pytest.mark.parametrize("name", CELLS)
def test_matrices_that_come_transposed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_support, "chip_family", lambda device: "gfx942")
    check(name, "float32", 3, 20, packed=True)
    check(name, "bfloat16", 3, 16, packed=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize(
    ("dim", "dtypes"), [(16, "float32"), (32, "float32"), (64, "float32"), (128, "bfloat16")]
)
def test_the_published_grid(name: str, dim: int, dtypes: str) -> None:
    """Batches, heads and head widths of it together (arXiv 2412.07752) for a few positions, and one
    row of 64."""
    for batch, heads in itertools.product((1, 2, 8, 17, 64), (1, 4, 12)):
        if batch * heads <= 64 or dim == 16:
            check(name, dtypes, 3, dim, False, heads, batch)
    check(name, dtypes, 1, dim, False, 1, 1)
    check(name, dtypes, 64, dim, False, 1, 1)


@pytest.mark.parametrize("dtypes", ("mixed", "float16"))
def test_weights_and_gates_of_other_dtypes(dtypes: str) -> None:
    check("slstm", dtypes, 3, 24, packed=False)


def test_wide_heads() -> None:
    check("lstm", "bfloat16", 4, 128, packed=False)


def test_many_positions_gather_no_rounding() -> None:
    """With weights of bfloat16 states stay exact to float32, which rounding h would not leave."""
    inputs = [x.to(DEVICE) for x in operands("lstm", 24, 1, 16)]
    inputs = [x.bfloat16().float() for x in inputs]
    inputs[1] = inputs[1].bfloat16()
    exact = run("lstm", backend="reference")(*(x.double() for x in inputs))
    found = run("lstm", backend="triton")(*inputs)
    for x, y in zip(found, exact, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", CELLS)
def test_more_rows_than_a_program_holds(name: str) -> None:
    gates = draw(18, 2, len(CELLS[name].gates), 1, 16).float().to(DEVICE)
    recurrent = 0.2 * draw(len(CELLS[name].gates), 1, 16, 16).float().to(DEVICE)
    found = nonlinear_rnn(name, gates, recurrent, backend="triton")
    expected = nonlinear_rnn(name, gates, recurrent, backend="chunked")
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ("slstm", "lstm"))
def test_extreme_gates_stay_finite(name: str) -> None:
    gates, recurrent, _, _ = operands(name, 6)
    gates = (80.0 * gates.sign() * (gates.abs() > 0.3)).float().to(DEVICE)
    run_it = run(name, backend="triton", segment_ids=documents(6).to(DEVICE))
    inputs = [gates, recurrent.float().to(DEVICE)]
    outputs, grads = gradients(lambda *x: run_it(*x, None, None), inputs)
    assert all(x.isfinite().all() for x in outputs + grads)


def test_traces_without_graph_breaks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # a compiler makes tensors without values of its own
    inputs = [x.float().to(DEVICE) for x in operands("gru", 3)]
    compiled = torch.compile(run("gru", backend="triton"), fullgraph=True, backend="aot_eager")
    results = [gradients(f, inputs) for f in (compiled, run("gru", backend="triton"))]
    for x, y in zip(*(outputs + grads for outputs, grads in results), strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.quick
def test_refusals() -> None:
    for width, dtype in ((129, torch.bfloat16), (65, torch.float32)):
        gates, weights = torch.zeros(BATCH, 2, 1, 1, width), torch.zeros(1, 1, width, width)
        with pytest.raises(ValueError, match=f"of up to {width - 1} channels, .* got {width}"):
            nonlinear_rnn("elman", gates, weights.to(dtype), backend="triton")
    with pytest.raises(ValueError, match=r"it takes float32, .* got float64"):
        run("lstm", backend="triton")(*operands("lstm", 2))
