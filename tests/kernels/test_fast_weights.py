"""Fast weights: inner gradients against autograd, the reference by hand, the chunked form against
it, and what documents, cuts and orders promise."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from rondo.kernels.fast_weights import (
    FastWeights,
    FastWeightState,
    apply_weights,
    fast_weight_state_shapes,
    fast_weights,
    gradient_sum,
    update_weights,
)
from rondo.tests import numerics
from rondo.tests.conftest import slow_but
from rondo.tests.numerics import assert_ratio

UPDATES = ("muon", "gradient")
ORDERS = ("apply_then_update", "update_then_apply")
BACKENDS = ("chunked", "reference")
HEADS, K, V, HIDDEN = 2, 4, 3, 5
NAMES = ("q", "k", "v", "learning_rates", "gate", "up", "down", "momentum")

every_update = pytest.mark.parametrize("update", UPDATES)
every_order = pytest.mark.parametrize("order", ORDERS)
every_backend = pytest.mark.parametrize("backend", BACKENDS)
close = functools.partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)


class Case(NamedTuple):
    """Inputs of the operator; None where the case goes without."""

    q: Tensor
    k: Tensor
    v: Tensor
    learning_rates: Tensor
    weights: FastWeights
    momentum: Tensor | None
    state: FastWeightState | None
    ids: Tensor | None

    def tensors(self) -> list[Tensor]:
        """All floating point inputs."""
        state = () if self.state is None else self.state
        every = (*self[:4], *self.weights, self.momentum, *state)
        return [x for x in every if x is not None and x.is_floating_point()]

    def rebuilt(self, tensors: Sequence[Tensor]) -> Case:
        rest = iter(tensors)
        sequences = [next(rest) for _ in range(4)]
        weights = FastWeights(*(next(rest) for _ in range(3)))
        momentum = None if self.momentum is None else next(rest)
        state = self.state
        if state is not None:
            state = FastWeightState._make(
                next(rest) if x is not None and x.is_floating_point() else x for x in state
            )
        return Case(*sequences, weights, momentum, state, self.ids)

    def part(self, part: slice) -> Case:
        """Some positions."""
        cut = [None if x is None else x[:, part] for x in (*self[:4], self.momentum, self.ids)]
        return self._replace(
            q=cut[0], k=cut[1], v=cut[2], learning_rates=cut[3], momentum=cut[4], ids=cut[5]
        )

    def run(self, *tensors: Tensor, **options: object) -> tuple[Tensor, FastWeightState]:
        case = self.rebuilt(tensors) if tensors else self
        return fast_weights(
            *case[:5],
            momentum=case.momentum,
            initial_state=case.state,
            segment_ids=case.ids,
            **options,
        )

    def flat(self, *tensors: Tensor, **options: object) -> list[Tensor]:
        """Outputs and the floating point part of the state."""
        o, state = self.run(*tensors, **options)
        return [o, *floats(state)]


def gradients(
    function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """`numerics.gradients` with outputs that may depend on nothing (the sums of a full chunk)."""

    def attached(*tensors: Tensor) -> list[Tensor]:
        outputs = function(*tensors)
        return [y if y.requires_grad else y + 0 * tensors[0].sum() for y in outputs]

    return numerics.gradients(attached, inputs)


def floats(state: FastWeightState) -> list[Tensor]:
    return [x for x in state if x is not None and x.is_floating_point()]


def make(
    time: int,
    *,
    dims: tuple[int, int, int] = (K, V, HIDDEN),
    dtype: torch.dtype = torch.float64,
    documents: float = 0.0,
    momentum: bool = True,
    open_tokens: tuple[int, int] | None = None,
    seed: int = 0,
) -> Case:
    """A batch of 2 rows; `documents` is the chance that a position starts a document, and
    `open_tokens` how many tokens of an open chunk the state of each row has, None for no state."""
    generator = torch.Generator().manual_seed(seed)
    draw = functools.partial(torch.randn, generator=generator, dtype=torch.float64)
    key_dim, value_dim, hidden = dims
    wide = torch.promote_types(dtype, torch.float32)
    q, k = (F.normalize(draw(2, time, HEADS, key_dim), dim=-1).to(dtype) for _ in range(2))
    v = draw(2, time, HEADS, value_dim).to(dtype)
    rates = (0.1 * draw(2, time, HEADS, 3).exp()).to(wide)
    shapes = ((hidden, key_dim), (hidden, key_dim), (value_dim, hidden))
    weights = FastWeights(*(draw(HEADS, *s).mul(s[1] ** -0.5).to(wide) for s in shapes))
    mixing = draw(2, time, HEADS).sigmoid().to(wide) if momentum else None
    state = None
    if open_tokens is not None:
        matrices = (2, HEADS, hidden, 2 * key_dim + value_dim)
        parts = [x.to(wide) for x in (draw(matrices), draw(matrices))]
        extra = [draw(matrices).to(wide), draw(2, HEADS).sigmoid().to(wide)] if momentum else []
        state = FastWeightState(*parts, torch.tensor(open_tokens), *extra)
    ids = (torch.rand(2, time, generator=generator) < documents).cumsum(1) if documents else None
    return Case(q, k, v, rates, weights, mixing, state, ids)


def packed(case: Case, lengths: Sequence[int]) -> Case:
    """The case with documents of these lengths in every row."""
    numbers = torch.tensor([3 * n + n % 2 for n in range(len(lengths))])
    return case._replace(ids=torch.repeat_interleave(numbers, torch.tensor(lengths)).expand(2, -1))


def same(actual: tuple[Tensor, FastWeightState], expected: tuple[Tensor, FastWeightState]) -> None:
    close(actual[0], expected[0])
    for x, y in zip(actual[1], expected[1], strict=True):
        if x is not None or y is not None:
            close(x, y)


def per_head(case: Case) -> tuple[FastWeights, list[Tensor]]:
    """Weights `(2, H, ...)`, and k, v and learning rates `(2, H, T, .)`."""
    tokens = [x.transpose(1, 2) for x in (case.k, case.v, case.learning_rates)]
    return case.weights.map(lambda w: w.expand(2, -1, -1, -1)), tokens


def test_gradient_sum_is_the_gradient() -> None:
    weights, (k, v, rates) = per_head(make(7))
    actual = gradient_sum(weights, k, v, rates)
    for j, name in enumerate(FastWeights._fields):
        leaves = weights.map(lambda w: w.clone().requires_grad_())
        inner = (rates[..., j] * (apply_weights(leaves, k) * v).sum(-1)).sum()
        (expected,) = torch.autograd.grad(inner, [getattr(leaves, name)])
        torch.testing.assert_close(getattr(actual, name), expected, rtol=1e-12, atol=1e-12)


def by_hand(case: Case, chunk: int, update_first: bool) -> Tensor:
    """Plain updates of the first head of row 0, token by token, from the equations alone."""
    wg, wu, wd = (w[0].clone() for w in case.weights)
    norms = [w.norm(dim=1, keepdim=True) for w in (wg, wu, wd)]
    moments = [torch.zeros_like(w) for w in (wg, wu, wd)]
    q, k, v, rates, beta = (x[0, :, 0] for x in (*case[:4], case.momentum))
    outputs = []
    for start in range(0, len(q), chunk):
        part = range(start, min(start + chunk, len(q)))
        read = [wd @ (F.silu(wg @ q[i]) * (wu @ q[i])) for i in part]
        sums = [torch.zeros_like(w) for w in (wg, wu, wd)]
        for i in part:
            a, u, d = wg @ k[i], wu @ k[i], wd.T @ v[i]
            s = 1 / (1 + (-a).exp())
            sums[0] += rates[i, 0] * torch.outer(d * u * s * (1 + a * (1 - s)), k[i])
            sums[1] += rates[i, 1] * torch.outer(d * a * s, k[i])
            sums[2] += rates[i, 2] * torch.outer(v[i], a * s * u)
        mean = beta[part.start : part.stop].mean()
        moments = [mean * m + g for m, g in zip(moments, sums, strict=True)]
        moved = [w + m for w, m in zip((wg, wu, wd), moments, strict=True)]
        wg, wu, wd = (
            w / w.norm(dim=1, keepdim=True) * n for w, n in zip(moved, norms, strict=True)
        )
        if update_first:
            read = [wd @ (F.silu(wg @ q[i]) * (wu @ q[i])) for i in part]
        outputs += read
    return torch.stack(outputs)


@every_backend
@every_order
def test_equations(order: str, backend: str) -> None:
    case = make(11)
    o, _ = case.run(update="gradient", order=order, chunk_size=4, backend=backend)
    expected = by_hand(case, 4, order == "update_then_apply")
    # eps of the norms leaves 1e-10 over the squared norm of a row.
    torch.testing.assert_close(o[0, :, 0], expected, rtol=1e-8, atol=1e-8)


@every_update
@every_order
@pytest.mark.parametrize("time", (1, 3, 4, 5, 13))
def test_chunked_equals_reference(time: int, order: str, update: str) -> None:
    settings = (
        (1, 0.0, True, (0, 0)),
        (4, 0.0, False, None),
        (4, 0.3, True, (3, 1)),
        (3, 0.15, False, (0, 2)),
        (20, 0.2, True, None),
    )
    for chunk, documents, momentum, opened in settings:
        case = make(time, documents=documents, momentum=momentum, open_tokens=opened)
        options = {"update": update, "order": order, "chunk_size": chunk}
        both = [case.run(backend=backend, **options) for backend in BACKENDS]
        same(*both)
        runs = [functools.partial(case.flat, backend=b, **options) for b in BACKENDS]
        actual, expected = (gradients(run, case.tensors())[1] for run in runs)
        for n, (x, y) in enumerate(zip(actual, expected, strict=True)):
            name = NAMES[n] if n < len(NAMES) else f"input {n}"
            assert_ratio(f"gradient of {name}, chunk {chunk}", x, y, 1e-10)


@every_update
@every_order
def test_gradcheck(order: str, update: str) -> None:
    case = make(7, documents=0.2, open_tokens=(1, 2), dims=(3, 2, 3))
    run = functools.partial(case.flat, update=update, order=order, chunk_size=3, backend="chunked")
    inputs = [x.clone().requires_grad_() for x in case.tensors()]
    torch.autograd.gradcheck(run, inputs, fast_mode=True)


@every_update
@every_order
@every_backend
def test_packed_documents_equal_separate_calls(backend: str, order: str, update: str) -> None:
    lengths = (6, 1, 13, 1, 1, 4, 8, 3)
    case = make(sum(lengths), open_tokens=(0, 3))
    options = {"update": update, "order": order, "chunk_size": 4, "backend": backend}

    def separate(*tensors: Tensor) -> list[Tensor]:
        moved, outputs, start = case.rebuilt(tensors), [], 0
        for length in lengths:
            o, last = moved.part(slice(start, start + length)).run(**options)
            outputs.append(o)
            moved, start = moved._replace(state=None), start + length
        return [torch.cat(outputs, dim=1), *floats(last)]

    whole = functools.partial(packed(case, lengths).flat, **options)
    results = [gradients(f, case.tensors()) for f in (whole, separate)]
    for x, y in zip(*(o + g for o, g in results), strict=True):
        close(x, y)


@every_order
def test_documents_do_not_leak(order: str) -> None:
    case = packed(make(20, dtype=torch.float32, open_tokens=(1, 2)), (11, 9))
    run = functools.partial(case.flat, order=order, chunk_size=4)
    changed = [x * 2 + 1 if x.shape[:2] == (2, 20) else x for x in case.tensors()]
    mixed = [
        torch.cat([y[:, :11], x[:, 11:]], dim=1) if x.shape[:2] == (2, 20) else x
        for x, y in zip(case.tensors(), changed, strict=True)
    ]
    mixed[8:] = [2 * x for x in mixed[8:]]  # the state, of the first document
    (o, *state), grads = gradients(run, case.tensors())
    (o2, *state2), grads2 = gradients(run, mixed)
    torch.testing.assert_close(o2[:, 11:], o[:, 11:], rtol=0, atol=0)
    torch.testing.assert_close(state2, state, rtol=0, atol=0)
    for x, y, tensor in zip(grads2, grads, mixed, strict=True):
        if tensor.shape[:2] == (2, 20):
            torch.testing.assert_close(x[:, 11:], y[:, 11:], rtol=0, atol=0)
    if torch.equal(o2[:, :11], o[:, :11]):
        raise AssertionError("the first document did not notice its own change")


@every_order
def test_what_is_not_a_number_stays_in_its_document(order: str) -> None:
    case = packed(make(20, dtype=torch.float32), (11, 9))
    broken = [x.clone() for x in case.tensors()]
    for x in broken:
        if x.shape[:2] == (2, 20):
            x[:, 0] = torch.nan
    o, *state = case.flat(order=order, chunk_size=4)
    o2, *state2 = case.flat(*broken, order=order, chunk_size=4)
    torch.testing.assert_close(o2[:, 11:], o[:, 11:], rtol=0, atol=0)
    torch.testing.assert_close(state2, state, rtol=0, atol=0)
    if o2[:, 0].isfinite().any():
        raise AssertionError("the first document did not notice")


@every_update
@every_backend
def test_cut_anywhere_equals_whole(backend: str, update: str) -> None:
    case = make(14, documents=0.12, open_tokens=(3, 0))
    options = {"update": update, "chunk_size": 4, "backend": backend}
    whole = case.run(**options)
    for cut in range(1, 14):
        same(continued(case, (cut, 14 - cut), options), whole)


@every_order
def test_gradients_through_cuts(order: str) -> None:
    case = make(13, open_tokens=(0, 0))
    options = {"order": order, "chunk_size": 4, "backend": "chunked"}
    cuts = (8, 5) if order == "update_then_apply" else (3, 3, 7)

    def in_parts(*tensors: Tensor) -> list[Tensor]:
        o, state = continued(case.rebuilt(tensors), cuts, options)
        return [o, *floats(state)]

    results = [
        gradients(f, case.tensors()) for f in (functools.partial(case.flat, **options), in_parts)
    ]
    for x, y in zip(*(o + g for o, g in results), strict=True):
        close(x, y)


def continued(
    case: Case, lengths: Sequence[int], options: dict[str, object]
) -> tuple[Tensor, FastWeightState]:
    """One call after the other, each with the state of the last where the document goes on."""
    outputs, start, state = [], 0, case.state
    for length in lengths:
        part = case.part(slice(start, start + length))._replace(state=state)
        if start and case.ids is not None:
            goes_on = case.ids[:, start - 1] == case.ids[:, start]
            part = part._replace(state=kept(state, goes_on, case))
        o, state = part.run(**options)
        outputs.append(o)
        start += length
    return torch.cat(outputs, dim=1), state


def kept(state: FastWeightState, rows: Tensor, case: Case) -> FastWeightState:
    """The state where `rows`, elsewhere that of a new document."""
    new = FastWeightState._make(None if x is None else torch.zeros_like(x) for x in state)
    new = new._replace(weights=case.weights.pack().expand_as(state.weights))
    return FastWeightState._make(
        None if x is None else torch.where(rows.view(-1, *[1] * (x.dim() - 1)), x, y)
        for x, y in zip(state, new, strict=True)
    )


@every_update
def test_decoding_token_by_token(update: str) -> None:
    case = make(11, dtype=torch.float64)
    options = {"update": update, "chunk_size": 3, "backend": "chunked"}
    same(continued(case, [1] * 11, options), case.run(**options))


@every_backend
def test_cuts_of_chunks_that_see_themselves(backend: str) -> None:
    """The state does not depend on cuts; outputs do not when cuts are between chunks, and after a
    cut inside one its tokens have seen all of it that came by then."""
    case = make(14)
    options = {"order": "update_then_apply", "chunk_size": 4, "backend": backend}
    o, state = case.run(**options)
    for cut in range(1, 14):
        parts = continued(case, (cut, 14 - cut), options)
        same((parts[0][:, cut:], parts[1]), (o[:, cut:], state))
        before = cut - cut % 4
        close(parts[0][:, :before], o[:, :before])


@every_update
@every_backend
def test_a_token_sees_the_chunks_before_its_own(backend: str, update: str) -> None:
    case = make(12, dtype=torch.float32)
    options = {"update": update, "chunk_size": 4, "backend": backend}
    o, _ = case.run(**options)
    for t in (0, 3, 4, 6):
        moved = [x.clone() for x in (*case[1:4], case.momentum)]
        for x in moved:
            x[:, t] = x[:, t] * 2 + 0.5
        after = case._replace(k=moved[0], v=moved[1], learning_rates=moved[2], momentum=moved[3])
        o2, _ = after.run(**options)
        end = t - t % 4 + 4
        torch.testing.assert_close(o2[:, :end], o[:, :end], rtol=0, atol=0)
        if torch.isclose(o2[:, end:], o[:, end:], rtol=0, atol=1e-6).all(-1).any():
            raise AssertionError(f"a token after chunk {t // 4} does not see position {t}")


@every_backend
def test_a_chunk_that_sees_itself_does_not_see_later_ones(backend: str) -> None:
    case = make(12, dtype=torch.float32)
    options = {"order": "update_then_apply", "chunk_size": 4, "backend": backend}
    o, _ = case.run(**options)
    values = case.v.clone()
    values[:, 6] += 1
    o2, _ = case._replace(v=values).run(**options)
    torch.testing.assert_close(o2[:, :4], o[:, :4], rtol=0, atol=0)
    if torch.isclose(o2[:, 4:], o[:, 4:], rtol=0, atol=1e-6).all(-1).any():
        raise AssertionError("a token of the chunk does not see the change")


def static(case: Case) -> Tensor:
    return apply_weights(case.weights, case.q.transpose(1, 2)).transpose(1, 2)


@every_update
@every_backend
def test_one_chunk_is_a_fixed_network(backend: str, update: str) -> None:
    case = make(9, documents=0.3)
    for chunk in (9, 50):
        o, _ = case.run(update=update, chunk_size=chunk, backend=backend)
        close(o, static(case))
    case = make(9)
    o, _ = case.run(update=update, chunk_size=8, backend=backend)
    if torch.isclose(o[:, 8], static(case)[:, 8]).all():
        raise AssertionError("the first chunk has changed nothing")


@pytest.mark.parametrize("lengths", ((7,), (4, 3), (8,)))
@pytest.mark.parametrize("opened", (None, (0, 0)))
def test_every_input_has_a_gradient(
    opened: tuple[int, int] | None, lengths: tuple[int, ...]
) -> None:
    """Also where no token reads what a chunk has taught: ranks reduce the same gradients."""
    case = packed(make(sum(lengths), open_tokens=opened), lengths)
    inputs = [x.requires_grad_() for x in case.tensors()[:8]]
    o, _ = case.run(chunk_size=8, backend="chunked")
    assert all(g is not None for g in torch.autograd.grad(o.sum(), inputs, allow_unused=True))


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
