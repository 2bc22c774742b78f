"""Head-wise recurrences: against the loop, torch's own layers, and what the equations promise."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from rondo.kernels import linear_scan, nonlinear_rnn
from rondo.kernels.nonlinear_rnn import CELLS, chunked, products, reference
from rondo.kernels.tiles import whole_tensors
from rondo.tests.numerics import assert_ratio, gradients

pytestmark = pytest.mark.quick

NAMES = tuple(CELLS)
BATCH, HEADS, DIM = 3, 2, 4
GRID_LIMIT = 2**22
LIMITS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def operands(
    name: str, time: int, heads: int = HEADS, dim: int = DIM, batch: int = BATCH
) -> list[Tensor]:
    """Gates, recurrent weights, bias, and a state that tokens can have left; one row's is fresh."""
    cell = CELLS[name]
    state = draw(batch, len(cell.states), heads, dim)
    if name == "slstm":
        state[:, 2] = 1 + state[:, 2].abs()
    state[0] = 0.0
    count = len(cell.gates)
    return [
        draw(batch, time, count, heads, dim),
        0.5 * draw(count, heads, dim, dim),
        0.5 * draw(len(cell.biases), heads, dim),
        state,
    ]


def run(name: str, **options: Any) -> Any:
    return lambda gates, recurrent, bias, state: nonlinear_rnn(
        name, gates, recurrent, bias=bias, initial_state=state, **options
    )


def documents(time: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return (torch.rand(BATCH, time, generator=generator) < 0.2).cumsum(1)


def compare(found: Any, expected: Any, limit: float) -> None:
    """Of what `gradients` returns."""
    names = ("h", "state", "dgates", "drecurrent", "dbias", "dinitial")
    pairs = zip(found[0] + found[1], expected[0] + expected[1], strict=True)
    for name, (x, y) in zip(names, pairs, strict=True):
        assert_ratio(name, x, y, limit)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("time", (1, 2, 7, 70))
def test_chunked_equals_the_loop(
    name: str, dtype: torch.dtype, time: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outputs, states and every gradient, with documents and carried state; odd blocks."""
    monkeypatch.setattr(chunked, "BLOCK", 9)
    exact = operands(name, time)
    inputs = [
        exact[0].to(dtype),
        *(x.to(torch.promote_types(dtype, torch.float32)) for x in exact[1:]),
    ]
    for ids in (None, documents(time)):
        expected = gradients(run(name, segment_ids=ids, backend="reference"), exact)
        found = gradients(run(name, segment_ids=ids, backend="chunked"), inputs)
        compare(found, expected, LIMITS[dtype])
        assert found[0][0].dtype == dtype
        assert found[0][1].dtype == torch.promote_types(dtype, torch.float32)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("heads", (1, 2))
def test_weights_laid_out_anew_are_the_same_weights(
    name: str, heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As large heads have them on a CPU; here small ones."""
    monkeypatch.setattr(products, "LEAST", 1)
    exact = operands(name, 12, heads)
    inputs = [x.float() for x in exact]
    assert len(products.Products(inputs[1].transpose(0, 1).flatten(1, 2), BATCH).packed) == heads
    for ids in (None, documents(12)):
        expected = gradients(run(name, segment_ids=ids, backend="reference"), exact)
        compare(gradients(run(name, segment_ids=ids, backend="chunked"), inputs), expected, 1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("batch", "time", "dim", "heads"),
    [
        (1, 1024, 16, 1),
        (2, 64, 16, 12),
        (8, 3, 32, 4),
        (17, 64, 16, 1),
        (64, 1, 64, 4),
        (2, 3, 128, 1),
    ],
)
def test_every_size_of_the_published_grid(
    name: str, batch: int, time: int, dim: int, heads: int
) -> None:
    """Each batch, length, head width and number of heads of it once (arXiv 2412.07752)."""
    compare_size(name, batch, time, dim, heads)


def compare_size(name: str, batch: int, time: int, dim: int, heads: int) -> None:
    """Against the loop; weights small enough that rounding does not grow over steps."""
    inputs = operands(name, time, heads, dim, batch)
    inputs[1] *= dim**-0.5
    expected = gradients(run(name, backend="reference"), inputs)
    compare(gradients(run(name, backend="chunked"), inputs), expected, 1e-11)


@pytest.mark.slow
@pytest.mark.parametrize("time", (1, 3, 64, 1024))
@pytest.mark.parametrize("name", NAMES)
def test_the_whole_published_grid(name: str, time: int) -> None:
    """Every batch, head width and number of heads of it together, up to `GRID_LIMIT` numbers of an
    LSTM's gates."""
    count = 0
    for batch, dim, heads in itertools.product((1, 2, 8, 17, 64), (16, 32, 64, 128), (1, 4, 12)):
        if 4 * batch * time * heads * dim <= GRID_LIMIT:
            compare_size(name, batch, time, dim, heads)
            count += 1
    assert count == {1: 60, 3: 60, 64: 55, 1024: 30}[time]


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_differences(name: str) -> None:
    """The state's c and n hang on m, which is a constant to gradients: of an sLSTM the outputs."""
    inputs = [x.requires_grad_() for x in operands(name, 4, 1, 2)]
    ids = torch.tensor([[0, 0, 0, 0], [0, 0, 1, 1], [0, 1, 2, 2]])

    def outputs(*x: Tensor) -> Any:
        h, state = run(name, segment_ids=ids, backend="chunked")(*x)
        return h if name == "slstm" else (h, state)

    if name == "slstm":  # differences would move m, and leave rows that are fresh
        inputs[3] = inputs[3].detach()
    assert torch.autograd.gradcheck(outputs, inputs)


@pytest.mark.parametrize("name", NAMES)
def test_a_cut_gradient_is_that_of_a_constant_h(name: str) -> None:
    """In products with R, held at what it was without a gradient; also where documents begin."""
    inputs, ids = operands(name, 9), documents(9)
    h, _ = run(name, segment_ids=ids)(*inputs)
    held = torch.cat((inputs[3][:, :1], h[:, :-1]), 1)
    starts = torch.diff(ids, dim=1, prepend=ids[:, :1]).bool()

    def constant(gates: Tensor, recurrent: Tensor, bias: Tensor, state: Tensor) -> list[Tensor]:
        outputs = []
        for t, x in enumerate(gates.unbind(1)):
            fresh = starts[:, t, None, None, None]
            state = state.masked_fill(fresh, 0.0)
            before = held[:, t].masked_fill(fresh[..., 0], 0.0)
            r = torch.einsum("ghoi,bhi->gbho", recurrent, before)
            step = getattr(reference, name)
            state = torch.stack(step(state.unbind(1), x.unbind(1), r, bias), 1)
            outputs.append(state[:, 0])
        return [torch.stack(outputs, 1), state]

    expected = gradients(constant, inputs)
    for backend in ("chunked", "reference"):
        cut = {"backend": backend, "gradient_recurrent_cut": True}
        compare(gradients(run(name, segment_ids=ids, **cut), inputs), expected, 1e-12)
    plain = gradients(run(name, segment_ids=ids), inputs)
    assert (plain[1][0] - expected[1][0]).abs().max() > 1e-3
    with pytest.raises(ValueError, match="no gradient_recurrent_cut"):
        run(name, backend="triton", gradient_recurrent_cut=True)(*inputs)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_a_state_reach_through_a_cut(name: str) -> None:
    """Two stretches with carried state are one pass, gradients included."""
    *inputs, state = operands(name, 11)
    ids = documents(11)

    def whole(*x: Tensor) -> list[Tensor]:
        return [run(name, segment_ids=ids)(*x, state)[0][:, 5:]]

    def halves(gates: Tensor, *x: Tensor) -> list[Tensor]:
        _, between = run(name, segment_ids=ids[:, :5])(gates[:, :5], *x, state)
        return [run(name, segment_ids=ids[:, 5:])(gates[:, 5:], *x, between)[0]]

    for found, expected in zip(gradients(halves, inputs), gradients(whole, inputs), strict=True):
        for x, y in zip(found, expected, strict=True):
            assert_ratio("halves", x, y, 1e-13)


def gates_of(weight: Tensor, count: int) -> Tensor:
    """torch's stacked matrices or biases of a layer with one head."""
    return weight.unflatten(0, (count, 1, -1))


@pytest.mark.parametrize("name", ("lstm", "gru", "elman"))
def test_one_head_is_torchs_layer(name: str) -> None:
    """Outputs, last state, and the gradients of inputs and every parameter."""
    kind = {"lstm": nn.LSTM, "gru": nn.GRU, "elman": nn.RNN}[name]
    torch.manual_seed(0)
    layer, count = kind(5, 6, batch_first=True).double(), len(CELLS[name].gates)
    names = [key for key, _ in layer.named_parameters()]

    def torchs(x: Tensor, *params: Tensor) -> list[Tensor]:
        values = dict(zip(names, params, strict=True))
        h, last = torch.func.functional_call(layer, values, (x,))
        last = last if isinstance(last, tuple) else (last,)
        return [h, torch.stack(last, 2)[0]]

    def ours(x: Tensor, w: Tensor, recurrent: Tensor, b: Tensor, other: Tensor) -> list[Tensor]:
        gates = gates_of(w, count)
        gates = torch.einsum("bti,ghoi->btgho", x, gates)
        b, other = gates_of(b, count), gates_of(other, count)
        bias = torch.cat((b[:2] + other[:2], b[2:], other[2:])) if name == "gru" else b + other
        h, state = nonlinear_rnn(name, gates, gates_of(recurrent, count), bias=bias)
        return [h[:, :, 0], state[:, :, 0]]

    inputs = [draw(BATCH, 13, 5), *layer.parameters()]
    for found, expected in zip(gradients(ours, inputs), gradients(torchs, inputs), strict=True):
        for x, y in zip(found, expected, strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_heads_are_blocks_of_one_matrix(name: str) -> None:
    gates, recurrent, bias, state = operands(name, 9)
    h, last = run(name)(gates, recurrent, bias, state)
    dense = torch.stack([torch.block_diag(*blocks) for blocks in recurrent]).unsqueeze(1)
    one = [x.flatten(-2).unsqueeze(-2) for x in (gates, bias, state)]
    other, other_last = run(name)(one[0], dense, *one[1:])
    torch.testing.assert_close(h.flatten(2), other.flatten(2), rtol=0, atol=1e-13)
    torch.testing.assert_close(last.flatten(2), other_last.flatten(2), rtol=0, atol=1e-13)


def test_without_recurrent_weights_a_cell_is_a_scan() -> None:
    gates, recurrent, _, state = operands("lstm", 33)
    h, last = run("lstm")(gates, torch.zeros_like(recurrent), None, state)
    i, f, z, o = gates.unbind(2)
    c, _ = linear_scan(f.sigmoid(), i.sigmoid() * z.tanh(), initial_state=state[:, 1])
    torch.testing.assert_close(h, o.sigmoid() * c.tanh(), rtol=0, atol=1e-12)
    torch.testing.assert_close(last[:, 1], c[:, -1], rtol=0, atol=1e-12)


def test_the_stabiliser_cancels() -> None:
    """All input gates larger by a constant: the same outputs; nothing is clamped."""
    gates, *others = operands("slstm", 40)
    others[-1].zero_()
    h, state = run("slstm")(gates, *others)
    assert (state[:, 2] >= 1).all()
    for shift in (5.0, -30.0):
        moved = gates.clone()
        moved[:, :, 0] += shift
        torch.testing.assert_close(run("slstm")(moved, *others)[0], h, rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("backend", ("chunked", "reference"))
def test_extreme_gates_stay_finite(name: str, backend: str) -> None:
    gates, recurrent, _, _ = operands(name, 30)
    gates = (80.0 * gates.sign() * (gates.abs() > 0.3)).float()
    run_it = run(name, backend=backend, segment_ids=documents(30))
    inputs = [gates, recurrent.float()]
    outputs, grads = gradients(lambda *x: run_it(*x, None, None), inputs)
    assert all(x.isfinite().all() for x in outputs + grads)


@pytest.mark.parametrize("name", NAMES)
def test_a_document_is_alone(name: str) -> None:
    """What came before a border changes nothing after it, to the bit."""
    inputs = operands(name, 12)
    ids = torch.tensor([[0] * 5 + [1] * 7, [0] * 5 + [1] * 7, [0] * 5 + [1] * 7])
    h, state = run(name, segment_ids=ids)(*inputs)
    inputs[0][:, :5] = 3.0
    other, other_state = run(name, segment_ids=ids)(*inputs)
    assert torch.equal(h[:, 5:], other[:, 5:])
    assert torch.equal(state, other_state)
    alone, _ = run(name)(inputs[0][:, 5:], *inputs[1:3], None)
    torch.testing.assert_close(other[:, 5:], alone, rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", NAMES)
def test_shapes_alone(name: str) -> None:
    """Without numbers one step stands for all: same shapes."""
    inputs = [x.to("meta").requires_grad_() for x in operands(name, 6)]
    with whole_tensors():
        h, state = run(name, segment_ids=documents(6).to("meta"))(*inputs)
        grads = torch.autograd.grad([h.sum() + state.sum()], inputs)
    assert h.shape == (BATCH, 6, HEADS, DIM)
    assert state.shape == inputs[3].shape
    assert [g.shape for g in grads] == [x.shape for x in inputs]


@pytest.mark.parametrize("name", list(CELLS))
def test_shapes_alone_of_a_wide_head(name: str) -> None:
    """Fake tensors, of which a plan is made, say that they are on a CPU, where the weights of a
    wide head are laid out anew."""
    count, dim = len(CELLS[name].gates), 512
    with FakeTensorMode(), whole_tensors():
        gates = torch.zeros(2, 3, count, 1, dim, requires_grad=True)
        recurrent = torch.zeros(count, 1, dim, dim, requires_grad=True)
        h, _ = nonlinear_rnn(name, gates, recurrent)
        grads = torch.autograd.grad(h.sum(), (gates, recurrent))
    assert h.shape == (2, 3, 1, dim)
    assert [g.shape for g in grads] == [gates.shape, recurrent.shape]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"cell": "lstn"}, "did you mean 'lstm'"),
        ({"gates": draw(2, 3, 3, HEADS, DIM)}, "3 gates at dimension 2, expected 4: i, f, z, o"),
        ({"recurrent": draw(4, HEADS, DIM, 3)}, r"recurrent has shape \(4, 2, 4, 3\)"),
        ({"bias": draw(3, HEADS, DIM)}, "bias has shape"),
        ({"initial_state": draw(2, HEADS, DIM)}, r"initial_state .* B of \(h, c\)"),
        ({"segment_ids": torch.zeros(2, 4, dtype=torch.long)}, "segment_ids has shape"),
        ({"backend": "fused"}, "backend 'fused' is not available"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], words: str) -> None:
    arguments = {
        "cell": "lstm",
        "gates": draw(2, 3, 4, HEADS, DIM),
        "recurrent": draw(4, HEADS, DIM, DIM),
        **changes,
    }
    with pytest.raises(ValueError, match=words):
        nonlinear_rnn(**arguments)
