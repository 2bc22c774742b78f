"""Fast weights at their limits: extreme inputs, precision, cost, and arguments that do not fit."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from rondo.kernels.fast_weights import (
    FastWeights,
    fast_weight_state_shapes,
    gradient_sum,
    update_weights,
)
from rondo.tests.conftest import slow_but
from rondo.tests.kernels.fast_weights_cases import (
    HEADS,
    HIDDEN,
    NAMES,
    ORDERS,
    Case,
    K,
    V,
    close,
    every_backend,
    every_order,
    every_update,
    floats,
    gradients,
    make,
    packed,
    per_head,
    same,
    static,
)
from rondo.tests.numerics import assert_ratio


@every_update
@every_order
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32))
def test_learning_rates_of_zero_change_nothing(dtype: torch.dtype, order: str, update: str) -> None:
    case = make(10, dtype=dtype, documents=0.1)
    case = case._replace(learning_rates=torch.zeros_like(case.learning_rates))
    run = functools.partial(case.flat, update=update, order=order, chunk_size=3)
    (o, weights, *_), grads = gradients(run, case.tensors())
    torch.testing.assert_close(o, static(case))
    torch.testing.assert_close(weights, case.weights.pack().expand_as(weights))
    for name, grad in zip(NAMES, grads, strict=True):
        if not grad.isfinite().all():
            raise AssertionError(f"the gradient of {name} is not finite")


@every_update
@pytest.mark.parametrize("what", ("k", "v", "q", "all"))
def test_tokens_of_zero_give_finite_gradients(what: str, update: str) -> None:
    case = make(9, dtype=torch.float32)
    names = ("q", "k", "v") if what == "all" else (what,)
    case = case._replace(**{name: torch.zeros_like(getattr(case, name)) for name in names})
    for order in ORDERS:
        run = functools.partial(case.flat, update=update, order=order, chunk_size=3)
        outputs, grads = gradients(run, case.tensors())
        for x in outputs + grads:
            if not x.isfinite().all():
                raise AssertionError(f"{order}: not finite")


@every_update
@every_order
def test_rows_keep_their_norms(order: str, update: str) -> None:
    case = make(24)
    expected = [w.norm(dim=-1).expand(2, -1, -1) for w in case.weights]
    for time in (4, 8, 24):
        _, state = case.part(slice(time)).run(update=update, order=order, chunk_size=4)
        weights = FastWeights.unpack(state.weights, K)
        if torch.allclose(weights.gate, case.weights.gate.expand_as(weights.gate)):
            raise AssertionError("nothing was updated")
        for actual, norms in zip(weights, expected, strict=True):
            torch.testing.assert_close(actual.norm(dim=-1), norms, rtol=1e-8, atol=0)


def test_rows_of_zero_stay_near_zero() -> None:
    case = make(8)
    gate = case.weights.gate.clone()
    gate[:, 1] = 0
    case = case._replace(weights=case.weights._replace(gate=gate))
    (_, weights, *_), grads = gradients(functools.partial(case.flat, chunk_size=4), case.tensors())
    row = FastWeights.unpack(weights, K).gate[:, :, 1]
    if not row.norm(dim=-1).max() <= 1e-5 or not all(g.isfinite().all() for g in grads):
        raise AssertionError(f"a row of zeros became {row.norm(dim=-1)}")


@every_update
@every_order
@pytest.mark.parametrize("size", (1e-30, 1e-6, 1e6, 1e12))
def test_extreme_learning_rates(size: float, order: str, update: str) -> None:
    case = make(24, dtype=torch.float32)
    case = case._replace(learning_rates=size * case.learning_rates)
    run = functools.partial(case.flat, update=update, order=order, chunk_size=4)
    outputs, grads = gradients(run, case.tensors())
    for x in outputs + grads:
        if not x.isfinite().all():
            raise AssertionError("not finite")
    expected = case.weights.pack().norm()
    torch.testing.assert_close(outputs[1][0].norm(), expected, rtol=1e-4, atol=0)


@every_update
@every_order
def test_order_of_the_tokens_of_a_chunk(order: str, update: str) -> None:
    case = make(8)
    shuffled = torch.cat([torch.randperm(4), 4 + torch.randperm(4)])
    moved = [x[:, shuffled] for x in (*case[:4], case.momentum)]
    other = Case(*moved[:4], case.weights, moved[4], None, None)
    options = {"update": update, "order": order, "chunk_size": 4}
    o, state = case.run(**options)
    o2, state2 = other.run(**options)
    same((o2, state2), (o[:, shuffled], state))


@every_update
def test_sums_of_ranks_add_up(update: str) -> None:
    """Tokens of a chunk on several ranks: only the gradients and momenta have to be summed."""
    case = make(10)
    weights, tokens = per_head(case)
    parts = [
        gradient_sum(weights, *(x[:, :, part] for x in tokens))
        for part in (slice(3), slice(3, 4), slice(4, 10))
    ]
    total = functools.reduce(lambda x, y: x.map(torch.add, y), parts)
    buffer = weights.map(torch.zeros_like)
    mean = sum(case.momentum[:, part].sum(1) for part in (slice(3), slice(3, 10))) / 10
    after, moment = update_weights(weights, total, case.weights, buffer, mean, update)
    _, state = case.run(update=update, chunk_size=10)
    close(after.pack(), state.weights)
    close(moment.pack(), state.momentum_buffer)


@pytest.mark.parametrize("momentum", (True, False))
def test_state_shapes(momentum: bool) -> None:
    for dtype, wide in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        o, state = make(7, dtype=dtype, momentum=momentum).run(chunk_size=4)
        shapes = fast_weight_state_shapes(2, HEADS, K, V, HIDDEN, momentum=momentum, dtype=wide)
        held = {n: (tuple(x.shape), x.dtype) for n, x in state._asdict().items() if x is not None}
        if held != shapes or o.dtype != dtype or state.count.tolist() != [3, 3]:
            raise AssertionError(f"{held}, {o.dtype}, {state.count}")


@every_update
@every_order
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_precision(dtype: torch.dtype, order: str, update: str) -> None:
    case = make(150, dims=(8, 8, 24), dtype=dtype, documents=0.01)
    options = {"update": update, "order": order, "chunk_size": 32}
    actual = gradients(functools.partial(case.flat, backend="chunked", **options), case.tensors())
    exact = [x.double() for x in case.tensors()]
    expected = gradients(functools.partial(case.flat, backend="reference", **options), exact)
    limit = 1e-2
    if dtype == torch.float32:
        limit = 1e-4 if update == "muon" else 1e-5
    for n, (x, y) in enumerate(zip(actual[0] + actual[1], expected[0] + expected[1], strict=True)):
        assert_ratio(f"number {n}", x, y, limit)


def test_short_documents_cost_no_more_than_long_ones() -> None:
    """With the causal order: reads by the initial weights are all that documents add."""
    case = make(256, dtype=torch.float32)
    counts = []
    for lengths in ((256,), (7,) * 36 + (4,), (100, 3, 100, 53)):
        with FlopCounterMode(display=False) as counter:
            packed(case, lengths).run(chunk_size=32, backend="chunked")
        counts.append(counter.get_total_flops())
    if not max(counts[1:]) <= counts[0]:
        raise AssertionError(f"FLOPs {counts}")


def test_flops_of_a_token_and_a_chunk() -> None:
    """The figures of the README: an r x c matrix, r <= c, costs 20 r^2 c + 10 r^3 a step."""
    tokens, matrices = HIDDEN * (2 * K + V), 0
    for rows, columns in ((K, HIDDEN), (K, HIDDEN), (V, HIDDEN)):
        matrices += 20 * rows**2 * columns + 10 * rows**3
    case = make(32, dtype=torch.float32)
    with FlopCounterMode(display=False) as counter:
        case.run(chunk_size=8, backend="chunked")
    expected = 2 * HEADS * (32 * 6 * tokens + 4 * matrices)
    if counter.get_total_flops() != expected:
        raise AssertionError(f"{counter.get_total_flops()} FLOPs, expected {expected}")


@every_backend
def test_recomputed_and_without_gradients(backend: str) -> None:
    case = make(9, documents=0.2)
    run = functools.partial(case.flat, chunk_size=4, backend=backend)

    def recomputed(*tensors: Tensor) -> list[Tensor]:
        return checkpoint(run, *tensors, use_reentrant=False)

    results = [gradients(f, case.tensors()) for f in (run, recomputed)]
    for x, y in zip(*(o + g for o, g in results), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)
    expected = case.run(chunk_size=4, backend=backend)
    with torch.inference_mode():
        same(case.run(chunk_size=4, backend=backend), expected)


def test_strided_inputs() -> None:
    case = make(10, documents=0.2, open_tokens=(0, 2))
    strided = [torch.stack([x, x], dim=-1)[..., 0] for x in case.tensors()]
    same(case.run(*strided, chunk_size=4), case.run(chunk_size=4))


def test_autocast_does_not_reach_inside() -> None:
    case = make(10, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = case.run(chunk_size=4)
    for x, y in zip(floats(inside[1]), floats(case.run(chunk_size=4)[1]), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)


@pytest.mark.parametrize("documents", slow_but((0.2,), (0.0, 0.2)))
def test_traces_without_graph_breaks(documents: float) -> None:
    case = make(5, documents=documents, dtype=torch.float32)
    run = functools.partial(case.flat, chunk_size=4, backend="chunked")
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    results = [gradients(f, case.tensors()) for f in (compiled, run)]
    for x, y in zip(*(o + g for o, g in results), strict=True):
        torch.testing.assert_close(x, y)


def test_tensors_without_numbers() -> None:
    case = make(9, documents=0.2, dtype=torch.float32)
    meta = case.rebuilt([x.to("meta") for x in case.tensors()])
    o, state = meta._replace(ids=case.ids.to("meta")).run(chunk_size=4)
    if o.shape != case.v.shape or state.weights.shape != (2, HEADS, HIDDEN, 2 * K + V):
        raise AssertionError(f"{o.shape}, {state.weights.shape}")


def test_a_state_of_another_chunk_size() -> None:
    case = make(5, open_tokens=(1, 4))
    case.run(chunk_size=5)
    with pytest.raises(ValueError, match=r"4 tokens of an open chunk.*another chunk_size than 4"):
        case.run(chunk_size=4)


@pytest.mark.parametrize(
    ("changes", "message"),
    (
        ({"q": torch.zeros(2, 5, HEADS, 9)}, r"q has shape \(2, 5, 2, 9\).*\(2, 5, 2, 4\)"),
        ({"k": torch.zeros(2, 5, HEADS)}, r"k has shape \(2, 5, 2\)"),
        ({"v": torch.zeros(2, 5, 3, V)}, r"k has shape .*\(2, 5, 3, 4\)"),
        ({"learning_rates": torch.zeros(2, 5, HEADS)}, r"learning_rates .*\(2, 5, 2, 3\)"),
        ({"momentum": torch.zeros(2, 4, HEADS)}, r"momentum .*\(2, 4, 2\).*\(2, 5, 2\)"),
        ({"ids": torch.zeros(2, 5)}, "segment_ids has .* dtype torch.float32"),
        ({"ids": torch.zeros(2, 6, dtype=torch.long)}, r"segment_ids has shape \(2, 6\)"),
    ),
)
def test_wrong_shapes(changes: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(5, dtype=torch.float32)._replace(**changes).run()


def test_wrong_weights_and_states() -> None:
    case = make(5, open_tokens=(0, 1))
    down = case.weights._replace(down=case.weights.down.mT)
    with pytest.raises(ValueError, match=r"weights.down has shape \(2, 5, 3\).*\(2, 3, 5\)"):
        case._replace(weights=down).run()
    with pytest.raises(ValueError, match=r"initial_state.momentum_buffer .* without momentum"):
        case._replace(momentum=None).run()
    with pytest.raises(ValueError, match=r"initial_state.gradient has shape \(1, 2, 5, 11\)"):
        case._replace(state=case.state._replace(gradient=case.state.gradient[:1])).run()


def test_wrong_options() -> None:
    for name, value, message in (
        ("update", "adam", "update is 'adam', expected one of muon, gradient"),
        ("order", "full", "order is 'full', expected one of apply_then_update, update_then_apply"),
        ("chunk_size", 0, "chunk_size is 0, expected at least 1"),
        ("backend", "fast", "backend 'fast'"),
    ):
        with pytest.raises(ValueError, match=message):
            make(5).run(**{name: value})
