"""The matrix memory of xLSTM: chunked, token by token, and all at once."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rondo.kernels import combine, mlstm, mlstm_summary
from rondo.kernels.mlstm import chunked, mlstm_stretch, stretch
from rondo.kernels.mlstm.stabiliser import peaks
from rondo.tests.numerics import assert_ratio, gradients

pytestmark = pytest.mark.quick

BATCH, HEADS, KEYS, VALUES = 3, 2, 4, 3
# Of outputs and gradients: a quotient of two rounded sums, the lower one near zero at times.
LIMITS = {torch.float64: (1e-11, 1e-11), torch.float32: (1e-5, 1e-5), torch.bfloat16: (2e-2, 0.1)}
NAMES = (("h", "state"), ("dq", "dk", "dv", "dinput", "dforget", "dinitial"))


def operands(time: int, gates: float = 2.0, groups: int = HEADS) -> list[Tensor]:
    """q, k, v and gates."""
    generator = torch.Generator().manual_seed(time)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    q, k = draw(BATCH, time, groups, KEYS), draw(BATCH, time, groups, KEYS)
    v = draw(BATCH, time, HEADS, VALUES)
    return [q, k, v, gates * draw(BATCH, time, HEADS), 1 + gates * draw(BATCH, time, HEADS)]


def documents(time: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return (torch.rand(BATCH, time, generator=generator) < 0.1).cumsum(1)


def some_state() -> Tensor:
    """What other tokens left."""
    return mlstm(*operands(5))[1]


def run(**options: Any) -> Any:
    return lambda *x: mlstm(*x[:5], initial_state=x[5], **options)


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize(("time", "chunk"), [(1, 64), (7, 1), (40, 16), (70, 64)])
def test_chunked_equals_the_loop(dtype: torch.dtype, time: int, chunk: int) -> None:
    """Outputs, states and every gradient, with documents and carried state."""
    exact = [*operands(time, groups=1), some_state()]
    wide = torch.promote_types(dtype, torch.float32)
    inputs = [x.to(dtype if i < 3 else wide) for i, x in enumerate(exact)]
    for ids in (None, documents(time)):
        expected = gradients(run(segment_ids=ids, backend="reference"), exact)
        found = gradients(run(segment_ids=ids, chunk_size=chunk, backend="chunked"), inputs)
        for which, limit in enumerate(LIMITS[dtype]):
            pairs = zip(NAMES[which], found[which], expected[which], strict=True)
            for name, x, y in pairs:
                assert_ratio(name, x, y, limit)
        assert (found[0][0].dtype, found[0][1].dtype) == (dtype, wide)


def at_once(q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor) -> Tensor:
    """The parallel form, T x T, as the paper has it."""
    sums = F.logsigmoid(f).cumsum(1).transpose(1, 2)
    logs = sums.unsqueeze(3) - sums.unsqueeze(2) + i.transpose(1, 2).unsqueeze(2)
    time = logs.shape[2]
    logs = logs.masked_fill(torch.ones(time, time, dtype=torch.bool).triu(1), -torch.inf)
    m = logs.amax(3, keepdim=True)
    scores = torch.einsum("bthk,bshk->bhts", q, k) * KEYS**-0.5 * (logs - m).exp()
    weights = scores / (torch.maximum(scores.sum(3, keepdim=True).abs(), (-m).exp()) + 1e-6)
    return torch.einsum("bhts,bshv->bthv", weights, v)


def test_it_is_the_parallel_form() -> None:
    """Up to eps, since m is another one: here it is not bounded by the start of the row."""
    inputs = operands(50)
    assert_ratio("h", mlstm(*inputs)[0], at_once(*inputs), 1e-6)


def test_gradients_are_those_of_differences() -> None:
    inputs = [x[:2].requires_grad_() for x in operands(5)]
    ids = torch.tensor([[0, 0, 0, 0, 0], [0, 0, 1, 1, 1]])
    assert torch.autograd.gradcheck(
        lambda *x: mlstm(*x, segment_ids=ids, eps=0.0, chunk_size=2)[0], inputs
    )


def test_the_stabiliser_cancels() -> None:
    """A state at another m is the same state."""
    state = some_state()
    other = torch.cat((state[..., :-1] * math.exp(2), state[..., -1:] - 2), -1)
    inputs = operands(9)
    h, last = mlstm(*inputs, initial_state=state, eps=0.0)
    again, other_last = mlstm(*inputs, initial_state=other, eps=0.0)
    torch.testing.assert_close(h, again, rtol=0, atol=1e-12)
    true = [x[..., :-1] * x[..., -1:].exp() for x in (last, other_last)]
    torch.testing.assert_close(*true, rtol=1e-12, atol=0)


@pytest.mark.parametrize("cut", (1, 16, 33))
def test_two_stretches_are_one(cut: int) -> None:
    """With carried state, gradients included, and by their summaries."""
    *inputs, ids = *operands(40), documents(40)
    ids[:, cut:] -= ids[:, cut : cut + 1] - ids[:, cut - 1 : cut]  # no border at the cut
    first = some_state()

    def halves(*x: Tensor) -> list[Tensor]:
        before = [y[:, :cut] for y in x], [y[:, cut:] for y in x]
        _, state = mlstm(*before[0], initial_state=first, segment_ids=ids[:, :cut])
        return [mlstm(*before[1], initial_state=state, segment_ids=ids[:, cut:])[0]]

    def whole(*x: Tensor) -> list[Tensor]:
        return [mlstm(*x, initial_state=first, segment_ids=ids)[0][:, cut:]]

    for found, expected in zip(gradients(halves, inputs), gradients(whole, inputs), strict=True):
        for x, y in zip(found, expected, strict=True):
            assert_ratio("halves", x, y, 1e-11)
    for part in (None, ids):  # of each row as one document, and of many
        parts = [
            mlstm_summary(*(y[:, s] for y in inputs[1:]), segment_ids=p)
            for s, p in (
                (slice(0, cut), None if part is None else part[:, :cut]),
                (slice(cut, 40), None if part is None else part[:, cut:]),
            )
        ]
        _, last = mlstm(*inputs, initial_state=first, segment_ids=part)
        for found in (parts[1].apply(parts[0].apply(first)), combine(*parts).apply(first)):
            true = [x[..., :-1] * x[..., -1:].exp() for x in (found, last)]
            assert_ratio("state", *true, 1e-11)


@pytest.mark.parametrize("size", (2.0, 200.0))
def test_stretches_begun_before_their_state_is_known(size: float) -> None:
    """Outputs, the last state and every gradient; gates of 200 let one stretch outweigh another by
    more than float32 holds."""
    inputs, cut = [*operands(40, size, groups=1), some_state()], 17

    def halves(*x: Tensor) -> list[Tensor]:
        first, second = (
            mlstm_stretch(*(y[:, s] for y in x[:5]), chunk_size=16)
            for s in (slice(cut), slice(cut, None))
        )
        early, state = first.finish(x[5])
        late, last = second.finish(state)
        torch.testing.assert_close(first.summary.apply(x[5])[..., -1], state[..., -1])
        return [torch.cat((early, late), 1), last]

    for found, expected in zip(gradients(halves, inputs), gradients(run(), inputs), strict=True):
        for x, y in zip(found, expected, strict=True):
            assert_ratio("halves", x, y, 1e-10)


def test_a_stretch_scans_its_stabiliser_once(monkeypatch: pytest.MonkeyPatch) -> None:
    scans, state = [], some_state()

    def counted(*gates: Any) -> Any:
        scans.append(1)
        return peaks(*gates)

    for module in (chunked, stretch):
        monkeypatch.setattr(module, "peaks", counted)
    mlstm_stretch(*operands(9)).finish(state)
    assert scans == [1]
    assert mlstm_stretch(*operands(9), backend="reference") is None
    with pytest.raises(ValueError, match="eps is -1"):
        mlstm_stretch(*operands(9), eps=-1.0)


@pytest.mark.parametrize("backend", ("chunked", "reference"))
@pytest.mark.parametrize("size", (50.0, 200.0))
def test_extreme_gates_stay_finite(backend: str, size: float) -> None:
    inputs = [x.float() for x in operands(70)]
    for gate in inputs[3:]:
        gate.copy_(size * gate.sign())
    outputs, grads = gradients(
        lambda *x: mlstm(*x, segment_ids=documents(70), backend=backend), inputs
    )
    assert all(x.isfinite().all() for x in outputs + grads)
    exact, _ = mlstm(*(x.double() for x in inputs), segment_ids=documents(70), backend="reference")
    assert_ratio("h", outputs[0], exact, 1e-4)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ((3, torch.zeros(BATCH, 4)), r"input_gate has shape \(3, 4\)"),
        ((4, torch.zeros(BATCH, 4, 3)), "forget_gate has shape"),
        ((2, torch.zeros(BATCH, 4, HEADS)), "v has shape"),
    ],
)
def test_what_does_not_fit_is_refused(change: tuple[int, Tensor], words: str) -> None:
    inputs = operands(4)
    inputs[change[0]] = change[1]
    with pytest.raises(ValueError, match=words):
        mlstm(*inputs)
    with pytest.raises(ValueError, match="initial_state has shape"):
        mlstm(*operands(4), initial_state=torch.zeros(BATCH, HEADS, 3))
    with pytest.raises(ValueError, match="eps is -1"):
        mlstm(*operands(4), eps=-1.0)


@pytest.mark.quick
def test_a_forced_triton_says_what_serves() -> None:
    words = "no Triton kernel is written for .* backend 'chunked' serves it"
    with pytest.raises(ValueError, match=f"mlstm: backend 'triton' cannot run: {words}"):
        mlstm(*operands(4), backend="triton")
    with pytest.raises(ValueError, match=words):
        mlstm_stretch(*operands(4), backend="triton")
