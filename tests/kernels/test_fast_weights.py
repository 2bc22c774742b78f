"""Fast weights: inner gradients against autograd, the reference by hand, the chunked form against
it, and what documents, cuts and orders promise."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from rondo.kernels.fast_weights import (
    FastWeights,
    FastWeightState,
    apply_weights,
    gradient_sum,
)
from rondo.tests.kernels.fast_weights_cases import (
    BACKENDS,
    NAMES,
    Case,
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
