"""Gated linear attention: the reference against a sum over pairs, the chunked form against it."""

from __future__ import annotations

import functools
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils import deterministic

from rondo.kernels.linear_attention import (
    gated_linear_attention,
    gated_linear_attention_summary,
)
from rondo.kernels.summary import combine
from rondo.tests.numerics import assert_ratio, gradients

GATES = ("none", "head", "key")
LIMITS = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-2}
K, V = 8, 6


class Case(NamedTuple):
    """Inputs of the operator; None where the case goes without."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None
    initial_state: Tensor | None
    segment_ids: Tensor | None

    def tensors(self) -> list[Tensor]:
        return [x for x in self[:5] if x is not None]

    def rebuilt(self, tensors: list[Tensor] | tuple[Tensor, ...]) -> Case:
        rest = iter(tensors)
        return Case(*(None if x is None else next(rest) for x in self[:5]), self.segment_ids)

    def run(self, *tensors: Tensor, **options: object) -> tuple[Tensor, Tensor]:
        q, k, v, g, state, ids = self.rebuilt(tensors) if tensors else self
        return gated_linear_attention(q, k, v, g, initial_state=state, segment_ids=ids, **options)


def make(
    time: int,
    gate: str = "head",
    *,
    heads: tuple[int, int] = (2, 4),
    dims: tuple[int, int] = (K, V),
    dtype: torch.dtype = torch.float64,
    documents: float = 0.0,
    state: bool = True,
    seed: int = 0,
) -> Case:
    """A batch of 2 rows; `documents` is the chance that a position starts a document."""
    generator = torch.Generator().manual_seed(seed)
    draw = functools.partial(torch.randn, generator=generator, dtype=torch.float64)
    (groups, all_heads), (key_dim, value_dim) = heads, dims
    q, k = (draw(2, time, groups, key_dim).to(dtype) for _ in range(2))
    v = draw(2, time, all_heads, value_dim).to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    log_decay = None
    if gate != "none":
        shape = (2, time, all_heads, key_dim)
        log_decay = F.logsigmoid(draw(shape if gate == "key" else shape[:3]) + 2).to(wide)
    initial = draw(2, all_heads, key_dim, value_dim).to(wide) if state else None
    ids = None
    if documents:
        ids = (torch.rand(2, time, generator=generator) < documents).cumsum(1)
    return Case(q, k, v, log_decay, initial, ids)


def check(case: Case, **options: object) -> None:
    """Outputs and gradients of the chunked form against the float64 reference."""
    actual = gradients(functools.partial(case.run, backend="chunked", **options), case.tensors())
    exact = [x.double() for x in case.tensors()]
    expected = gradients(functools.partial(case.run, backend="reference"), exact)
    inputs = ("q", "k", "v", "log_decay", "initial_state")
    names = ["o", "state"] + ["d" + n for n, x in zip(inputs, case, strict=False) if x is not None]
    for name, x, y in zip(names, actual[0] + actual[1], expected[0] + expected[1], strict=True):
        assert_ratio(name, x, y, LIMITS[case.v.dtype])


def pair_sum(case: Case, scale: float) -> Tensor:
    """Outputs as a sum over pairs of positions, written without any recurrence over states."""
    q, k, v, g, state, ids = case
    batch, time, heads, _ = v.shape
    q, k = (x.repeat_interleave(heads // x.shape[2], dim=2) for x in (q, k))
    g = torch.zeros_like(v[..., :1]) if g is None else g.reshape(batch, time, heads, -1)
    o = torch.zeros_like(v)
    for i in range(time):
        for j in range(-1, i + 1):
            decay = g[:, j + 1 : i + 1].sum(1).exp()
            first = ids[:, max(j, 0)]
            visible = (first == ids[:, i]).view(-1, 1, 1)
            if j < 0:
                read = torch.einsum("bhk,bhkv->bhv", q[:, i] * decay, state)
            else:
                read = (q[:, i] * decay * k[:, j]).sum(-1, keepdim=True) * v[:, j]
            o[:, i] += scale * torch.where(visible, read, 0.0)
    return o


@pytest.mark.parametrize("gate", GATES)
def test_reference_is_a_sum_over_pairs(gate: str) -> None:
    case = make(12, gate, documents=0.2)
    o, _ = case.run(backend="reference", scale=0.7)
    torch.testing.assert_close(o, pair_sum(case, 0.7), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("time", (1, 15, 16, 17, 63, 64, 65, 130))
def test_chunked_equals_reference(time: int, gate: str) -> None:
    for chunk, heads, documents in ((16, (1, 3), 0.0), (32, (2, 4), 0.05), (64, (2, 2), 0.3)):
        check(make(time, gate, heads=heads, documents=documents), chunk_size=chunk)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("heads", ((1, 4), (2, 2)))
def test_precision(dtype: torch.dtype, gate: str, heads: tuple[int, int]) -> None:
    for documents in (0.0, 0.02):
        case = make(200, gate, heads=heads, dims=(32, 48), dtype=dtype, documents=documents)
        check(case)
        o, state = case.run()
        if o.dtype != dtype or state.dtype != torch.float32:
            raise AssertionError(f"o is {o.dtype}, state is {state.dtype}")


@pytest.mark.parametrize("gate", GATES)
def test_odd_chunks_and_no_state(gate: str) -> None:
    check(make(70, gate, state=False), chunk_size=48)
    if gate != "key":
        check(make(30, gate, documents=0.1), chunk_size=7)


@pytest.mark.parametrize("gate", GATES)
def test_gradcheck(gate: str) -> None:
    case = make(19, gate, heads=(1, 2), dims=(3, 2), documents=0.1)
    inputs = [x[:1].clone().requires_grad_() for x in case.tensors()]
    case = case._replace(segment_ids=case.segment_ids[:1])
    torch.autograd.gradcheck(
        functools.partial(case.run, chunk_size=16, backend="chunked"), inputs, fast_mode=True
    )


@pytest.mark.parametrize("gate", GATES)
def test_gradient_of_one_output_alone(gate: str) -> None:
    case = make(40, gate, documents=0.05)
    for index in (0, 1):
        grads = []
        for backend in ("chunked", "reference"):
            inputs = [x.clone().requires_grad_() for x in case.tensors()]
            out = case.run(*inputs, chunk_size=16, backend=backend)[index]
            grads.append(torch.autograd.grad(out.sum(), inputs, allow_unused=True))
        for x, y in zip(*grads, strict=True):
            torch.testing.assert_close(x, torch.zeros_like(x) if y is None else y)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("backend", ("chunked", "reference"))
def test_packed_documents_equal_separate_calls(gate: str, backend: str) -> None:
    lengths = (20, 1, 45, 1, 1, 13)
    case = make(sum(lengths), gate)
    ids = torch.repeat_interleave(torch.tensor([3, 4, 7, 8, 9, 20]), torch.tensor(lengths))
    packed = case._replace(segment_ids=ids.expand(2, -1))

    def separate(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        *sequences, state = tensors
        outputs = []
        for parts in zip(*(x.split(lengths, dim=1) for x in sequences), strict=True):
            alone = case._replace(segment_ids=None, initial_state=state)
            o, last = alone.run(*parts, state, chunk_size=16, backend=backend)
            outputs.append(o)
            state = torch.zeros_like(state)
        return torch.cat(outputs, dim=1), last

    whole = functools.partial(packed.run, chunk_size=16, backend=backend)
    results = [gradients(f, case.tensors()) for f in (whole, separate)]
    for x, y in zip(*(o + g for o, g in results), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("gate", GATES)
def test_documents_do_not_leak(gate: str) -> None:
    case = make(60, gate, dtype=torch.float32)
    ids = (torch.arange(60) >= 37).long().expand(2, -1)
    case = case._replace(segment_ids=ids)
    (o, state), grads = gradients(functools.partial(case.run, chunk_size=16), case.tensors())
    other = [torch.cat([x[:, :37] * 3 - 1, x[:, 37:]], dim=1) for x in case.tensors()[:-1]]
    (o2, state2), grads2 = gradients(
        functools.partial(case.run, chunk_size=16), [*other, case.initial_state * 5]
    )
    torch.testing.assert_close(o2[:, 37:], o[:, 37:], rtol=0, atol=0)
    torch.testing.assert_close(state2, state, rtol=0, atol=0)
    for x, y in zip(grads2[:-1], grads[:-1], strict=True):
        torch.testing.assert_close(x[:, 37:], y[:, 37:], rtol=0, atol=0)
    if torch.equal(o2[:, :37], o[:, :37]):
        raise AssertionError("the first document did not notice its own change")


@pytest.mark.parametrize("gate", GATES)
def test_split_with_carried_state_equals_whole(gate: str) -> None:
    case = make(90, gate, documents=0.04)
    whole = case.run(chunk_size=16)
    for cut in (1, 16, 41, 89):
        first, second = (
            Case(
                *(None if x is None else x[:, part] for x in case[:4]),
                case.initial_state,
                case.segment_ids[:, part],
            )
            for part in (slice(cut), slice(cut, None))
        )
        o1, state = first.run(chunk_size=16)
        same = (case.segment_ids[:, cut - 1] == case.segment_ids[:, cut]).view(-1, 1, 1, 1)
        o2, state = second._replace(initial_state=state * same).run(chunk_size=16)
        torch.testing.assert_close(torch.cat([o1, o2], dim=1), whole[0], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(state, whole[1], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("gate", GATES)
def test_causality(gate: str) -> None:
    case = make(50, gate, dtype=torch.float32)
    inputs = [x.clone().requires_grad_() for x in case.tensors()]
    o, _ = case.run(*inputs, chunk_size=16)
    for t in (0, 15, 16, 37):
        grads = torch.autograd.grad(o[:, t].sum(), inputs[:-1], retain_graph=True)
        for name, grad in zip("qkvg", grads, strict=False):
            if grad[:, t + 1 :].count_nonzero():
                raise AssertionError(f"o[{t}] depends on later {name}")


@pytest.mark.parametrize("gate", ("head", "key"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("value", (0.0, -1e-4, -50.0, -1e4, "mix"))
def test_extreme_gates(gate: str, dtype: torch.dtype, value: float | str) -> None:
    case = make(130, gate, dims=(32, 32), dtype=dtype)
    if value == "mix":
        choice = torch.randint(4, case.log_decay.shape, generator=torch.manual_seed(1))
        log_decay = torch.tensor([0.0, -1e-4, -50.0, -1e4])[choice]
    else:
        log_decay = torch.full_like(case.log_decay, value)
    check(case._replace(log_decay=log_decay))
    check(case._replace(log_decay=log_decay, segment_ids=(torch.arange(130) // 50).expand(2, -1)))


@pytest.mark.parametrize("gate", ("head", "key"))
def test_minus_infinity_forgets_everything(gate: str) -> None:
    case = make(40, gate)
    log_decay = torch.where(torch.rand(case.log_decay.shape) < 0.2, -torch.inf, case.log_decay)
    check(case._replace(log_decay=log_decay), chunk_size=16)
    summary = gated_linear_attention_summary(case.k, case.v, log_decay, chunk_size=16)
    state = case._replace(log_decay=log_decay).run(chunk_size=16)[1]
    torch.testing.assert_close(summary.apply(case.initial_state), state)


def test_gates_agree_where_they_coincide() -> None:
    case = make(70, "head", documents=0.05)
    by_key = case._replace(log_decay=case.log_decay.unsqueeze(-1).expand(-1, -1, -1, K))
    for x, y in zip(by_key.run(), case.run(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)
    zero = case._replace(log_decay=torch.zeros_like(case.log_decay))
    for x, y in zip(case._replace(log_decay=None).run(), zero.run(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)


def summary_of(case: Case, part: slice = slice(None)):
    k, v, g, ids = (None if x is None else x[:, part] for x in (*case[1:4], case.segment_ids))
    return gated_linear_attention_summary(k, v, g, segment_ids=ids, chunk_size=16)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("documents", (0.0, 0.03))
def test_summaries_compose(gate: str, documents: float) -> None:
    case = make(75, gate, documents=documents)
    whole = summary_of(case)
    shape = (2, 4, K if gate == "key" else 1, 1)
    if whole.transition.shape != shape or whole.state.shape != (2, 4, K, V):
        raise AssertionError(f"{whole.transition.shape}, {whole.state.shape}")
    close = functools.partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)
    close(whole.apply(case.initial_state), case.run(backend="reference")[1])
    if documents:
        return  # a document that ends exactly at a cut is only visible to whoever holds both parts
    for cut in (1, 16, 40, 74):
        both = combine(summary_of(case, slice(cut)), summary_of(case, slice(cut, None)))
        for x, y in zip(both, whole, strict=True):
            close(x, y)
    a, b, c = (summary_of(case, part) for part in (slice(20), slice(20, 55), slice(55, None)))
    for x, y in zip(combine(combine(a, b), c), combine(a, combine(b, c)), strict=True):
        close(x, y)


@pytest.mark.parametrize("gate", GATES)
def test_summary_gradients(gate: str) -> None:
    case = make(40, gate, documents=0.03)

    def through_summary(*tensors: Tensor) -> list[Tensor]:
        moved = case.rebuilt(tensors)
        return [summary_of(moved).apply(moved.initial_state)]

    results = [
        gradients(f, case.tensors())
        for f in (through_summary, lambda *x: [case.run(*x, backend="reference")[1]])
    ]
    for x, y in zip(*(o + g for o, g in results), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("gate", GATES)
def test_unwritten_memory_is_never_read(gate: str) -> None:
    case = make(70, gate, documents=0.05)
    plain = gradients(case.run, case.tensors())
    torch.use_deterministic_algorithms(True)
    try:
        if not deterministic.fill_uninitialized_memory:
            raise AssertionError("torch.empty is not filled with NaN")
        poisoned = gradients(case.run, case.tensors())
    finally:
        torch.use_deterministic_algorithms(False)
    for x, y in zip(plain[0] + plain[1], poisoned[0] + poisoned[1], strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)


@pytest.mark.parametrize("gate", GATES)
def test_strided_inputs(gate: str) -> None:
    case = make(40, gate, documents=0.05)
    strided = [torch.stack([x, x], dim=-1)[..., 0] for x in case.tensors()]
    for x, y in zip(case.run(*strided), case.run(), strict=True):
        torch.testing.assert_close(x, y)


def test_autocast_does_not_reach_inside() -> None:
    case = make(70, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = case.run()
    for x, y in zip(inside, case.run(), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)


@pytest.mark.parametrize("gate", ("head", "key"))
def test_traces_without_graph_breaks(gate: str) -> None:
    case = make(20, gate, documents=0.05, dtype=torch.float32)
    run = functools.partial(case.run, chunk_size=16)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    results = [gradients(f, case.tensors()) for f in (compiled, run)]
    for x, y in zip(*(o + g for o, g in results), strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize(
    ("changes", "message"),
    (
        ({"q": torch.zeros(2, 20, 2, 9)}, r"q has shape \(2, 20, 2, 9\)"),
        ({"q": torch.zeros(2, 20, 2)}, r"q has shape \(2, 20, 2\)"),
        ({"v": torch.zeros(2, 20, 3, V)}, "v has 3 heads, k has 2"),
        ({"v": torch.zeros(2, 21, 4, V)}, r"\(2, 20\), v has \(2, 21\)"),
        ({"log_decay": torch.zeros(2, 20, 4, 5)}, r"log_decay has shape \(2, 20, 4, 5\)"),
        ({"initial_state": torch.zeros(2, 4, V, K)}, r"initial_state has shape \(2, 4, 6, 8\)"),
        ({"segment_ids": torch.zeros(2, 21, dtype=torch.long)}, r"segment_ids has .*\(2, 21\)"),
        ({"segment_ids": torch.zeros(2, 20)}, "segment_ids has .* dtype torch.float32"),
    ),
)
def test_wrong_shapes(changes: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(20, dtype=torch.float32)._replace(**changes).run()


def test_wrong_options() -> None:
    for gate, chunk in (("head", 0), ("key", 24), ("key", -16)):
        with pytest.raises(ValueError, match=f"chunk_size is {chunk}"):
            make(20, gate).run(chunk_size=chunk)
    with pytest.raises(ValueError, match="backend 'fast'"):
        make(20).run(backend="fast")
    with pytest.raises(ValueError, match="scale is nan"):
        make(20).run(scale=float("nan"))
