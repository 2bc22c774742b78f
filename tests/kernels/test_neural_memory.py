"""Neural memory: the chunked form against the token loop, and what the equations promise."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rondo.kernels import gated_delta_rule, l2_norm, neural_memory
from rondo.kernels.neural_memory import MemoryState
from rondo.kernels.neural_memory.layers import gradients as inner_gradients
from rondo.tests.numerics import assert_ratio, error_ratio, gradients

pytestmark = pytest.mark.quick

BATCH, HEADS, DIM, INNER = 2, 2, 4, 6
SHAPES = {
    1: [(DIM, DIM)],
    2: [(INNER, DIM), (DIM, INNER)],
    3: [(INNER, DIM), (INNER, INNER), (DIM, INNER)],
    4: [(INNER, DIM), (INNER, INNER), (INNER, INNER), (DIM, INNER)],
}


def operands(time: int, depth: int = 2, batch: int = BATCH, seed: int = 0) -> list[Tensor]:
    """q, k, v, learning rate, log momentum, log decay, and the matrices of a memory."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    q, k = (l2_norm(draw(batch, time, HEADS, DIM)) for _ in range(2))
    rate, momentum, decay = (draw(batch, time, HEADS) for _ in range(3))
    gates = [0.2 * rate.sigmoid(), F.logsigmoid(momentum + 1), F.logsigmoid(decay + 3)]
    weights = [0.5 * draw(HEADS, *shape) for shape in SHAPES[depth]]
    return [q, k, draw(batch, time, HEADS, DIM), *gates, *weights]


def run(*tensors: Tensor, **options: Any) -> list[Tensor]:
    """Output and state."""
    o, state, _ = neural_memory(*tensors[:6], tuple(tensors[6:]), **options)
    return [o, state.values]


def documents(time: int) -> Tensor:
    """One document in one row; one of a token and one longer than a chunk in the other."""
    ids = torch.zeros(BATCH, time, dtype=torch.long)
    ids[1, time // 3 :] += 1
    ids[1, time // 3 + 1 :] += 1
    return ids


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
@pytest.mark.parametrize(("time", "chunk"), [(1, 4), (4, 4), (11, 4), (23, 5), (9, 1), (5, 16)])
def test_chunks_equal_the_token_loop(depth: int, time: int, chunk: int) -> None:
    """Outputs, states and all gradients, with and without documents and a state."""
    inputs = operands(time, depth)
    first = neural_memory(*operands(3, depth, seed=4)[:6], tuple(inputs[6:]), chunk_size=chunk)
    done = first.state.done

    def of(values: Tensor, *x: Tensor, carried: bool, **options: Any) -> list[Tensor]:
        state = MemoryState(values, done) if carried else None
        return run(*x, chunk_size=chunk, initial_state=state, **options)

    for carried, segment_ids in itertools.product((False, True), (None, documents(time))):
        options = {"carried": carried, "segment_ids": segment_ids, "residual": not carried}
        expected, actual = (
            gradients(
                functools.partial(of, backend=backend, **options), [first.state.values, *inputs]
            )
            for backend in ("reference", "chunked")
        )
        for a, b in zip([*actual[0], *actual[1]], [*expected[0], *expected[1]], strict=True):
            assert_ratio("memory", a, b, 1e-10)


@pytest.mark.parametrize("depth", [1, 3])
def test_limits_act_alike_in_packed_rows(depth: int) -> None:
    """Outputs, states, all gradients and the count, with a state, documents and both limits."""
    inputs, limits = operands(23, depth), {"chunk_size": 4, "max_update": 0.8, "max_weight": 1.5}
    values, done = neural_memory(
        *operands(3, depth, seed=4)[:6], tuple(inputs[6:]), chunk_size=4
    ).state
    found, counts = [], []
    for backend in ("reference", "chunked"):

        def of(values: Tensor, *x: Tensor, backend: str = backend) -> list[Tensor]:
            output = neural_memory(
                *x[:6],
                tuple(x[6:]),
                initial_state=MemoryState(values, done),
                segment_ids=documents(23),
                backend=backend,
                **limits,
            )
            counts.append(output.limited)
            return [output.o, output.state.values]

        outputs, grads = gradients(of, [values, *inputs])
        found.append([*outputs, *grads])
    assert torch.equal(counts[0], counts[-1]) and counts[0].sum() > 0
    for a, b in zip(found[1], found[0], strict=True):
        assert_ratio("limited memory", a, b, 1e-10)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("depth", [1, 2])
def test_gradcheck(backend: str, depth: int) -> None:
    inputs = [x.requires_grad_() for x in operands(5, depth, batch=1)]

    def of(*x: Tensor) -> list[Tensor]:
        return run(*x, backend=backend, chunk_size=3, max_update=0.8, max_weight=1.5)

    limited = neural_memory(
        *inputs[:6], tuple(inputs[6:]), chunk_size=3, max_update=0.8, max_weight=1.5
    ).limited
    assert limited.sum() > 0
    # The reference's gradients are autograd's: one direction is enough.
    assert torch.autograd.gradcheck(of, inputs, fast_mode=backend == "reference")


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_inner_gradients_are_those_of_autograd(depth: int, residual: bool) -> None:
    _, k, v, *_ = (x[0, 0] for x in operands(1, depth))
    weights = [w[:1].clone().requires_grad_() for w in operands(1, depth)[6:]]
    x = k[:1, None]
    for i, w in enumerate(weights):
        x = (F.silu(x) if i else x) @ w.mT
    loss = (x + (k[:1, None] if residual else 0) - v[:1, None]).square().sum()
    inputs, errors = inner_gradients(weights, k[:1, None], v[:1, None], residual)
    for wanted, a, e in zip(torch.autograd.grad(loss, weights), inputs, errors, strict=True):
        torch.testing.assert_close(e.mT @ a, wanted, rtol=1e-9, atol=1e-12)


def test_weights_are_two_scans() -> None:
    """The state after a chunk, from gradients at its start and scans over tokens."""
    q, k, v, rate, momentum, decay, w = operands(6, 1, batch=1)
    output = neural_memory(
        q, k, v, rate, momentum, decay, (w,), residual=False, chunk_size=6, max_update=1e9
    )
    m, s = w, torch.zeros_like(w)
    for t in range(6):
        error = 2 * (torch.einsum("hvk,hk->hv", w, k[0, t]) - v[0, t])
        u = error[:, :, None] * k[0, t, :, None, :]
        s = momentum[0, t].exp()[:, None, None] * s - rate[0, t, :, None, None] * u
        m = decay[0, t].exp()[:, None, None] * m + s
    values = output.state.values[0].unflatten(-1, (DIM, DIM))
    torch.testing.assert_close(values[:, 1], m, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(values[:, 2], s, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(values[:, 0], w, rtol=0, atol=0)


def test_reads_without_momentum_are_sums_over_the_chunk() -> None:
    """Equation 16 of arXiv 2501.00663: M_t = β_t M_0 - Σ_{i<=t} θ_i (β_t / β_i) u_i, every u_i at
    the chunk's first weights M_0."""
    q, k, v, rate, _, decay, w = operands(6, 1, batch=1)
    none = torch.full_like(rate, -torch.inf)
    o = neural_memory(
        q, k, v, rate, none, decay, (w,), residual=False, chunk_size=6, max_update=1e9
    ).o
    error = 2 * (torch.einsum("hvk,thk->thv", w, k[0]) - v[0])
    u = error[..., None] * k[0, :, :, None]
    beta = decay[0].cumsum(0).exp()[..., None, None]
    for t in range(6):
        steps = rate[0, : t + 1, :, None, None] * (beta[t] / beta[: t + 1]) * u[: t + 1]
        m = beta[t] * w - steps.sum(0)
        read = torch.einsum("hvk,hk->hv", m, q[0, t])
        torch.testing.assert_close(o[0, t], read, rtol=1e-10, atol=1e-12)


def test_one_matrix_without_momentum_is_a_delta_rule() -> None:
    """beta = 2 θ; there the state decays before the error is taken, here with the update: the
    state there is that of a token earlier here, and `1 - α_{t+1}` times its own."""
    q, k, v, rate, _, log_decay, _ = operands(17, 1)
    none, keep = torch.full_like(rate, -torch.inf), torch.zeros_like(rate)
    zero = torch.zeros(HEADS, DIM, DIM, dtype=torch.float64)
    o, state, _ = neural_memory(
        q, k, v, rate, none, keep, (zero,), residual=False, chunk_size=1, max_update=1e9
    )
    expected, last = gated_delta_rule(q, k, v, 2 * rate, scale=1.0)
    torch.testing.assert_close(o, expected, rtol=1e-10, atol=1e-12)
    matrix = state.values[:, :, 1].unflatten(-1, (DIM, DIM))
    torch.testing.assert_close(matrix, last.mT, rtol=1e-10, atol=1e-12)
    following = torch.cat([log_decay[:, 1:], torch.zeros_like(log_decay[:, :1])], 1)
    fade = following.exp()
    o = neural_memory(
        q,
        k,
        v,
        rate * fade,
        none,
        following,
        (zero,),
        residual=False,
        chunk_size=1,
        max_update=1e9,
    ).o
    expected, _ = gated_delta_rule(q, k, v, 2 * rate, log_decay, scale=1.0)
    torch.testing.assert_close(o, fade[..., None] * expected, rtol=1e-10, atol=1e-12)


def test_a_pair_is_written_in_one_step() -> None:
    _, k, v, rate, *_ = operands(1, 1)
    gates = torch.full_like(rate, 0.5), torch.full_like(rate, -torch.inf), torch.zeros_like(rate)
    zero = torch.zeros(HEADS, DIM, DIM, dtype=torch.float64)
    k = F.normalize(k, dim=-1)
    o = neural_memory(k, k, v, *gates, (zero,), residual=False).o
    torch.testing.assert_close(o, v, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_extreme_gates(backend: str) -> None:
    """Forgetting everything leaves the newest update; a rate of zero leaves a fading memory; no
    gate makes a gradient that is not a number."""
    inputs = operands(9, 2)
    minus = torch.full_like(inputs[3], -torch.inf)
    newest = run(*inputs[:4], minus, minus, *inputs[6:], backend=backend, chunk_size=4)[1]
    torch.testing.assert_close(newest[:, :, 1], newest[:, :, 2], rtol=0, atol=0)
    still = [*inputs[:3], torch.zeros_like(inputs[3]), *inputs[4:]]
    values = run(*still, backend=backend, chunk_size=4, residual=False)[1]
    fade = inputs[5].sum(1).exp()[..., None]
    wanted = fade * torch.cat([w.flatten(1) for w in inputs[6:]], -1)
    torch.testing.assert_close(values[:, :, 1], wanted, rtol=1e-12, atol=1e-14)
    mixed = inputs[4].clone()
    mixed[:, ::2], mixed[:, 1::4] = -torch.inf, -1e4
    _, grads = gradients(
        lambda *x: run(*x, backend=backend, chunk_size=4),
        [*inputs[:4], mixed, mixed.clone(), *inputs[6:]],
    )
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("split", [1, 3, 4, 8, 10])
def test_two_calls_equal_one(split: int) -> None:
    """Split anywhere, then token by token: nothing of the tokens is kept."""
    inputs = operands(13, 2)
    weights = tuple(inputs[6:])
    whole = neural_memory(*inputs[:6], weights, chunk_size=4)
    parts = [x[:, :split] for x in inputs[:6]]
    o, state, limited = neural_memory(*parts, weights, chunk_size=4)
    outputs = [o]
    for t in range(split, 13):
        one = [x[:, t : t + 1] for x in inputs[:6]]
        o, state, more = neural_memory(*one, weights, chunk_size=4, initial_state=state)
        outputs.append(o)
        limited = limited + more
    torch.testing.assert_close(torch.cat(outputs, 1), whole.o, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(state.values, whole.state.values, rtol=1e-11, atol=1e-12)
    assert torch.equal(state.done, whole.state.done)
    assert torch.equal(limited, whole.limited)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_packed_documents_equal_separate_ones(backend: str) -> None:
    inputs, ids = operands(13, 2), documents(13)
    weights = tuple(inputs[6:])
    packed = neural_memory(*inputs[:6], weights, chunk_size=4, segment_ids=ids, backend=backend)
    for row in range(BATCH):
        for document in ids[row].unique():
            here = ids[row] == document
            alone = neural_memory(
                *(x[row : row + 1, here] for x in inputs[:6]), weights, chunk_size=4
            )
            torch.testing.assert_close(packed.o[row, here], alone.o[0], rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(packed.state.values[row], alone.state.values[0])
        assert packed.state.done[row] == alone.state.done[0]


def test_no_output_sees_a_later_token() -> None:
    inputs = [x.float() for x in operands(12, 2)]
    before = run(*inputs, chunk_size=4)[0]
    changed = [x.clone() for x in inputs]
    for x in changed[:4]:
        x[:, 6:] = 0.3
    after = run(*changed, chunk_size=4)[0]
    assert torch.equal(before[:, :6], after[:, :6])
    assert not torch.equal(before[:, 6:], after[:, 6:])


def test_bfloat16_is_computed_in_float32() -> None:
    rounded = [x.bfloat16() for x in operands(20, 2)]
    actual = gradients(lambda *x: run(*x, chunk_size=8)[:1], rounded)
    expected = gradients(lambda *x: run(*x, chunk_size=8)[:1], [x.double() for x in rounded])
    assert actual[0][0].dtype == torch.bfloat16
    for a, b in zip([*actual[0], *actual[1]], [*expected[0], *expected[1]], strict=True):
        assert_ratio("bfloat16", a, b, 1e-2)


@pytest.mark.parametrize("depth", [1, 3])
def test_float32_stays_close(depth: int) -> None:
    """Chunks in float32 against the token loop in float64: outputs, state, all gradients."""
    inputs = operands(60, depth)
    low = gradients(lambda *x: run(*x, chunk_size=8), [x.float() for x in inputs])
    expected = gradients(lambda *x: run(*x, chunk_size=8, backend="reference"), inputs)
    for a, b in zip([*low[0], *low[1]], [*expected[0], *expected[1]], strict=True):
        assert_ratio("float32", a, b, 1e-5)


def test_a_gradient_that_grows_is_limited_alike() -> None:
    """From chunk to chunk, with documents and a state, beside the limits of the memory."""
    inputs = operands(23, 3)
    values, done = neural_memory(*operands(3, 3, seed=4)[:6], tuple(inputs[6:]), chunk_size=4).state

    def found(backend: str, limit: float) -> list[Tensor]:
        def of(values: Tensor, *x: Tensor) -> list[Tensor]:
            return run(
                *x,
                initial_state=MemoryState(values, done),
                segment_ids=documents(23),
                backend=backend,
                chunk_size=4,
                max_update=0.8,
                max_weight=1.5,
                max_gradient=limit,
            )

        return gradients(of, [values, *inputs])[1]

    expected, free = found("reference", 1.0), found("reference", 1e10)
    for a, b, other in zip(found("chunked", 1.0), expected, free, strict=True):
        assert_ratio("limited gradient", a, b, 1e-10)
        assert torch.equal(b, other) or error_ratio(b, other) > 1e-3
    assert error_ratio(expected[0], free[0]) > 1e-3


def hostile(scales: tuple[float, ...], seeds: int) -> list[Tensor]:
    """Depth 4, 4,096 tokens, full steps, no forgetting and nearly no loss of momentum: a row for
    each scale of v, a head for each seed."""
    time, dim = 4096, 8
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, time, seeds, dim, generator=generator) for _ in range(3))
    v = v * torch.tensor(scales)[:, None, None, None]
    ones = torch.ones(v.shape[:3])
    weights = [torch.randn(seeds, dim, dim, generator=generator) for _ in range(4)]
    return [q.expand_as(v), l2_norm(k).expand_as(v), v, ones, -0.001 * ones, 0.0 * ones, *weights]


def test_limits_keep_a_hostile_memory_finite_and_say_so() -> None:
    """Outputs, and every gradient of a loss that is linear in them."""
    tensors = hostile((0.1, 1.0, 10.0), 10)
    found = neural_memory(*tensors[:6], tuple(tensors[6:]))
    assert found.o.isfinite().all() and (found.limited > 0).all()
    _, grads = gradients(lambda *x: run(*x)[:1], tensors)
    assert all(grad.isfinite().all() for grad in grads)
    first = [x[:1] for x in tensors[:6]]
    free = neural_memory(*first, tuple(tensors[6:]), max_update=1e30, max_weight=1e30)
    assert not free.o.isfinite().all()


def test_limits_that_are_not_reached_change_nothing() -> None:
    calm = operands(20, 2)
    limited, wide = (
        neural_memory(*calm[:6], tuple(calm[6:]), max_update=limit, max_weight=limit)
        for limit in (100.0, 1e9)
    )
    assert limited.limited.sum() == 0 and torch.equal(limited.o, wide.o)


def test_wrong_shapes_are_named() -> None:
    inputs = operands(4, 2)
    with pytest.raises(
        ValueError, match=r"weights have shapes .* expected matrices \(H, out, in\)"
    ):
        neural_memory(*inputs[:6], (inputs[6],))
    with pytest.raises(ValueError, match="log_decay has shape"):
        neural_memory(*inputs[:5], inputs[5][:, :2], tuple(inputs[6:]))
    with pytest.raises(ValueError, match="values has shape"):
        state = neural_memory(*operands(4, 1)[:6], tuple(operands(4, 1)[6:])).state
        neural_memory(*inputs[:6], tuple(inputs[6:]), initial_state=state)
    with pytest.raises(ValueError, match="k has shape"):
        neural_memory(inputs[0], inputs[1][:, :2], *inputs[2:6], tuple(inputs[6:]))


def test_a_state_of_another_chunk_is_refused() -> None:
    inputs = operands(10, 2)
    state = neural_memory(*inputs[:6], tuple(inputs[6:]), chunk_size=16).state
    with pytest.raises(ValueError, match=r"initial_state\.done has 10 tokens .* chunk_size than 4"):
        neural_memory(*inputs[:6], tuple(inputs[6:]), chunk_size=4, initial_state=state)
