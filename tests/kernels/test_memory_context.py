"""memory_context: against its definition written out, one token at a time."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rondo.kernels import memory_context
from rondo.kernels.memory_context import ContextState
from rondo.kernels.memory_context.segments import pieces
from rondo.tests.numerics import assert_ratio, gradients

B, H, D = 2, 2, 4
OPTIONS = {"segment_size": 6, "chunk_size": 3}


def make(time: int, seed: int = 0, depth: int = 2, dim: int = D, batch: int = B) -> list[Tensor]:
    """The operator's tensors in float64, flat: sequences, projections, weights of the memory."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    q, o, r = (draw(batch, time, H, dim) for _ in range(3))
    gates = [
        0.3 * draw(batch, time, H).sigmoid(),
        -draw(batch, time, H).exp() / 2,
        -draw(batch, time, H).exp(),
    ]
    widths = [dim, *[dim + 1] * (depth - 1), dim]
    weights = [0.5 * draw(H, out, into) for into, out in itertools.pairwise(widths)]
    projections = [0.7 * draw(H, dim, dim) for _ in range(5)]
    return [q, o, draw(batch, time, H), F.normalize(r, dim=-1), *gates, *projections, *weights]


def call(tensors: list[Tensor], **options: Any) -> Any:
    sequences, rest = tensors[:7], tensors[7:]
    groups = tuple(rest[:2]), tuple(rest[2:5]), tuple(rest[5:])
    return memory_context(*sequences, *groups, **{**OPTIONS, **options})


def network(weights: list[Tensor], x: Tensor) -> Tensor:
    y = x
    for i, w in enumerate(weights):
        y = w @ (F.silu(y) if i else y)
    return x + y


def inner_loss(weights: list[Tensor], key: Tensor, value: Tensor) -> Tensor:
    return (network(weights, key) - value).square().sum()


def unit(x: Tensor) -> Tensor:
    return x * (x.square().sum() + 1e-6).rsqrt()


def naive_row(tensors: list[Tensor], row: int, head: int, segment: int, chunk: int) -> Tensor:
    """One head of a row that is one document, `(T, 2 D)`, by autograd for the inner gradient."""
    q, o, lse, r, theta, eta, decay = (x[row, :, head] for x in tensors[:7])
    w_k, w_v, *learned = (w[head] for w in tensors[7:12])
    weights = [w[head] for w in tensors[12:]]
    momentum = [torch.zeros_like(w) for w in weights]
    outputs, keys, values, before, anchor = [], [], [], weights, weights
    for t in range(len(q)):
        if t % segment == 0:
            before, keys, values = weights, [], []
        if t % chunk == 0:
            anchor = weights
        h = network(before, r[t])
        keys.append(unit(w_k @ h) * len(h) ** 0.5)
        values.append(w_v @ h)
        scores = torch.stack([key @ q[t] for key in keys]) * len(h) ** -0.5
        share = torch.cat([lse[t, None], scores]).softmax(0)
        y = share[0] * o[t] + share[1:] @ torch.stack(values)
        to_read, key, value = (F.silu(w @ y) for w in learned)
        to_read, key = unit(to_read), unit(key)
        updates = torch.func.grad(inner_loss)(anchor, key, value)
        momentum = [eta[t].exp() * s - theta[t] * u for s, u in zip(momentum, updates, strict=True)]
        weights = [decay[t].exp() * w + s for w, s in zip(weights, momentum, strict=True)]
        outputs.append(torch.cat([y, network(weights, to_read)]))
    return torch.stack(outputs)


def naive(tensors: list[Tensor], segment: int = 6, chunk: int = 3) -> Tensor:
    rows = [
        torch.stack([naive_row(tensors, row, head, segment, chunk) for head in range(H)], 1)
        for row in range(B)
    ]
    return torch.stack(rows)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("time,depth", [(1, 1), (7, 1), (14, 2), (18, 3)])
def test_matches_its_definition(backend: str, time: int, depth: int) -> None:
    tensors = make(time, depth=depth)
    expected, expected_grads = gradients(lambda *x: [naive(list(x))], tensors)
    actual, grads = gradients(lambda *x: [call(list(x), backend=backend).o], tensors)
    assert_ratio("o", actual[0], expected[0], 1e-9)
    for number, (a, e) in enumerate(zip(grads, expected_grads, strict=True)):
        assert_ratio(f"gradient {number}", a, e, 1e-8)


def test_backends_agree_with_documents() -> None:
    tensors = make(25)
    ids = torch.zeros(B, 25, dtype=torch.long)
    ids[0, 4:], ids[0, 12:], ids[1, 13:] = 1, 5, 2
    results = {}
    for backend in ("reference", "chunked"):

        def run(*x: Tensor, backend: str = backend) -> list[Tensor]:
            found = call(list(x), segment_ids=ids, backend=backend)
            return [found.o, found.state.values]

        outputs, grads = gradients(run, tensors)
        results[backend] = [*outputs, *grads]
    for number, (a, e) in enumerate(zip(*results.values(), strict=True)):
        assert_ratio(f"tensor {number}", a, e, 1e-9)


def test_packed_equals_separate() -> None:
    tensors, cuts = make(20), (0, 5, 6, 20)
    ids = torch.zeros(B, 20, dtype=torch.long)
    for start in cuts[1:-1]:
        ids[:, start:] += 2
    packed = call(tensors, segment_ids=ids)
    for a, b in itertools.pairwise(cuts):
        alone = call([*(x[:, a:b] for x in tensors[:7]), *tensors[7:]])
        assert_ratio(f"document {a}", packed.o[:, a:b], alone.o, 1e-12)
    assert_ratio("state", packed.state.values, alone.state.values, 1e-12)
    assert torch.equal(packed.state.count, alone.state.count)


@pytest.mark.parametrize("cut", [1, 3, 5, 6, 11, 12])
@pytest.mark.parametrize("packed", [False, True])
def test_cut_anywhere_equals_the_whole(cut: int, packed: bool) -> None:
    tensors, ids = make(15), None
    if packed:
        ids = torch.zeros(B, 15, dtype=torch.long)
        ids[0, 4:], ids[1, 13:] = 1, 2

    def part(x: list[Tensor], piece: slice, state: ContextState | None) -> Any:
        own = None if ids is None else ids[:, piece]
        cut_tensors = [*(s[:, piece] for s in x[:7]), *x[7:]]
        return call(cut_tensors, initial_state=state, segment_ids=own)

    def whole(*x: Tensor) -> list[Tensor]:
        found = call(list(x), segment_ids=ids)
        return [found.o, found.state.values]

    def halves(*x: Tensor) -> list[Tensor]:
        first = part(list(x), slice(0, cut), None)
        second = part(list(x), slice(cut, 15), first.state)
        return [torch.cat([first.o, second.o], 1), second.state.values]

    expected, expected_grads = gradients(whole, tensors)
    actual, grads = gradients(halves, tensors)
    for number, (a, e) in enumerate(zip(actual + grads, expected + expected_grads, strict=True)):
        assert_ratio(f"tensor {number}", a, e, 1e-9)


def test_later_tokens_change_nothing() -> None:
    tensors = [x.float() for x in make(20)]
    before = call(tensors).o
    for x in tensors[:7]:
        x[:, 13:] -= 0.1
    after = call(tensors).o
    assert torch.equal(before[:, :13], after[:, :13])
    assert not torch.equal(before[:, 13:], after[:, 13:])


def test_what_is_recalled_is_older_than_the_segment() -> None:
    """What y finds in a segment does not depend on what the memory learns in it."""
    tensors = make(12)
    changed = list(tensors)
    changed[4] = tensors[4].clone()
    changed[4][:, 6:] *= 3  # learning rates of the second segment
    y, m = call(tensors).o.chunk(2, -1)
    other_y, other_m = call(changed).o.chunk(2, -1)
    torch.testing.assert_close(other_y, y)
    assert not torch.allclose(other_m[:, 6:], m[:, 6:])


def test_gradcheck() -> None:
    tensors = [x.requires_grad_() for x in make(5, dim=2)]
    options = {"segment_size": 4, "chunk_size": 2}
    torch.autograd.gradcheck(lambda *x: call(list(x), **options).o, tensors)


def test_bfloat16_stays_close() -> None:
    tensors = make(40, dim=16)
    expected = call(tensors).o
    low = [x.bfloat16() if i in (0, 1, 3) else x.float() for i, x in enumerate(tensors)]
    actual = call(low)
    assert actual.o.dtype == torch.bfloat16
    assert actual.state.values.dtype == torch.float32
    assert_ratio("o", actual.o, expected, 2e-2)


def test_pieces_cut_where_any_row_begins_a_segment() -> None:
    ids = torch.tensor([[0, 0, 0, 0, 0, 0, 0], [0, 0, 1, 1, 1, 1, 1]])
    found = pieces((2, 7), 4, 4, ids, None, torch.device("cpu"))
    assert [(p.start, p.stop, p.fresh) for p in found] == [
        (0, 2, True),
        (2, 4, False),
        (4, 6, False),
        (6, 7, False),
    ]
    assert [None if p.renews is None else p.renews.tolist() for p in found] == [
        [True, True],
        [False, True],
        [True, False],
        [False, True],
    ]


@pytest.mark.parametrize(
    "change,message",
    [
        ({"segment_size": 7}, "segment_size is 7, expected a multiple of chunk_size 3"),
        ({"o": torch.zeros(B, 6, H, D)}, r"o has shape \(2, 6, 2, 4\), expected \(2, 5, 2, 4\)"),
        ({"recalled": (torch.zeros(H, D, D),)}, "recalled has shapes .* expected 2 of"),
        (
            {"initial_state": ContextState(torch.zeros(B, H, 200), torch.full((B,), 7))},
            r"initial_state.count has 7 tokens of a segment: .* segment_size than 6",
        ),
        (
            {"initial_state": ContextState(torch.zeros(B, H, 3), torch.zeros(B))},
            r"initial_state.values has shape \(2, 2, 3\)",
        ),
    ],
)
def test_refusals(change: dict[str, Any], message: str) -> None:
    tensors = make(5)
    names = ("q", "o", "lse", "r", "learning_rate", "log_momentum", "log_decay")
    arguments = dict(zip(names, tensors[:7], strict=True))
    arguments |= {"recalled": tuple(tensors[7:9]), "learned": tuple(tensors[9:12])}
    arguments |= {"weights": tuple(tensors[12:]), **OPTIONS, **change}
    with pytest.raises(ValueError, match=message):
        memory_context(**arguments)


def test_compiles_with_one_graph_for_all_lengths() -> None:
    """The operator is left out of graphs, whose pieces would be of many lengths."""
    compiled = torch.compile(lambda *x: call(list(x)).o * 2, backend="eager")
    for time in (5, 9, 14):
        tensors = make(time)
        torch.testing.assert_close(compiled(*tensors), call(tensors).o * 2)
