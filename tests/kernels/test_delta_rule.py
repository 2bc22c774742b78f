"""The gated delta rule: recurrence, chunked form, and what they promise."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from rondo.kernels.delta_rule import gated_delta_rule
from rondo.kernels.delta_rule.triangular import invert_unit_lower
from rondo.tests.kernels.delta_rule_cases import (
    EXTREMES,
    GATES,
    assert_same,
    cast,
    compare,
    cut,
    make,
    run_with_gradients,
)
from rondo.tests.numerics import assert_ratio, error_ratio, gradients


def naive(args: dict[str, Tensor | None], b: int, h: int) -> tuple[Tensor, Tensor]:
    """One sequence and head straight from the definition, with explicit transition matrices."""
    q, k, v = args["q"], args["k"], args["v"]
    group = h // (v.shape[2] // k.shape[2])
    state, outputs = args["initial_state"][b, h], []
    size = k.shape[-1]
    for t in range(v.shape[1]):
        key, beta = k[b, t, group], args["beta"][b, t, h]
        decay = torch.zeros(size, dtype=v.dtype)
        if args["log_decay"] is not None:
            decay = decay + args["log_decay"][b, t, h]
        transition = torch.eye(size, dtype=v.dtype) - beta * torch.outer(key, key)
        state = transition @ torch.diag(decay.exp()) @ state + beta * torch.outer(key, v[b, t, h])
        outputs.append(state.T @ q[b, t, group] / size**0.5)
    return torch.stack(outputs), state


@pytest.mark.parametrize("gate", GATES)
def test_reference_is_the_definition(gate: str) -> None:
    args = make(11, gate, groups=2, heads=4, beta=(0.0, 2.0))
    o, state = gated_delta_rule(**args, backend="reference")
    for b, h in itertools.product(range(2), range(4)):
        expected, last = naive(args, b, h)
        assert_ratio("o", o[b, :, h], expected, 1e-13)
        assert_ratio("state", state[b, h], last, 1e-13)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("time", [1, 15, 16, 17, 63, 64, 65, 130])
def test_chunked_float64(gate: str, time: int) -> None:
    compare(make(time, gate, beta=(0.0, 2.0)), torch.float64, 1e-10)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("chunk", [16, 32, 64])
def test_chunk_sizes_and_grouped_heads(gate: str, chunk: int) -> None:
    args = make(70, gate, groups=2, heads=4)
    compare(args, torch.float64, 1e-10, chunk_size=chunk)
    compare(args, torch.float32, 1e-5, chunk_size=chunk)


@pytest.mark.parametrize("gate", GATES)
def test_grouped_heads_are_repeated_ones(gate: str) -> None:
    args = make(40, gate, groups=2, heads=4)
    repeated = args | {n: args[n].repeat_interleave(2, dim=2) for n in "qk"}
    grouped, plain = run_with_gradients(args), run_with_gradients(repeated)
    for name in ("d_q", "d_k"):
        plain[name] = plain[name].unflatten(2, (2, 2)).sum(3)
    assert_same(grouped, plain, 1e-12)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize(("low", "high", "limit"), [(0, 1, 1e-5), (0, 2, 1e-5), (2, 2, 3e-5)])
def test_float32(gate: str, low: float, high: float, limit: float) -> None:
    compare(make(130, gate, key=32, beta=(low, high)), torch.float32, limit)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize(
    ("low", "high", "limit", "gradient_limit"),
    [(0, 1, 1e-2, 1e-2), (0, 2, 1e-2, 1.5e-2), (1.9, 2, 3e-2, 3e-2)],
)
def test_bfloat16(gate: str, low: float, high: float, limit: float, gradient_limit: float) -> None:
    args = make(200, gate, key=64, value=32, beta=(low, high))
    compare(args, torch.bfloat16, limit, gradient_limit)


def test_scale_and_default_state() -> None:
    args = make(20) | {"initial_state": None}
    zeros = torch.zeros(2, 2, 16, 8, dtype=torch.float64)
    o, state = gated_delta_rule(**args, scale=0.7)
    default, same = gated_delta_rule(**args | {"initial_state": zeros})
    torch.testing.assert_close(o, default * 0.7 * 4)
    torch.testing.assert_close(state, same)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_documents_are_separate_calls(gate: str, backend: str) -> None:
    lengths = [1, 70, 1, 14, 2, 64, 3]
    args = make(sum(lengths), gate, batch=1, beta=(0.0, 2.0))
    ids = torch.repeat_interleave(torch.arange(len(lengths)) * 3 + 5, torch.tensor(lengths))
    both = [ids, torch.zeros_like(ids)]  # the second row is one document
    args = {n: None if x is None else x.expand(2, *x.shape[1:]) for n, x in args.items()}
    packed = run_with_gradients(args, segment_ids=torch.stack(both), backend=backend)
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(packed["o"].shape, generator=generator, dtype=torch.float64)
    d_state = torch.randn(packed["state"].shape, generator=generator, dtype=torch.float64)

    start, rows = 0, {n: [] for n in packed}
    for length in lengths:
        end = start + length
        part = cut({n: None if x is None else x[:1] for n, x in args.items()}, start, end)
        if start > 0:
            part["initial_state"] = torch.zeros_like(part["initial_state"])
        leaves = {n: x.detach().clone().requires_grad_() for n, x in part.items() if x is not None}
        o, state = gated_delta_rule(**leaves, backend=backend)
        last = d_state[:1] if end == sum(lengths) else torch.zeros_like(state)
        grads = torch.autograd.grad(
            (o, state), list(leaves.values()), (weights[:1, start:end], last)
        )
        rows["o"].append(o)
        rows["state"].append(state)
        for n, g in zip(leaves, grads, strict=True):
            rows[f"d_{n}"].append(g)
        start = end
    for name, parts in rows.items():
        if name == "state":
            expected = parts[-1]
        else:
            expected = parts[0] if name == "d_initial_state" else torch.cat(parts, dim=1)
        assert_ratio(name, packed[name][:1], expected, 1e-10)
    one = run_with_gradients(args, backend=backend)
    assert_same({n: x[1:] for n, x in packed.items()}, {n: x[1:] for n, x in one.items()}, 1e-10)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_leaks_into_the_next_document(gate: str, dtype: torch.dtype) -> None:
    ids = (torch.arange(130) >= 40).long().expand(2, -1)
    args = cast(make(130, gate), dtype)
    other = cast(make(130, gate, seed=1), dtype)
    mixed = {
        n: None if x is None else torch.cat([other[n][:, :40], x[:, 40:]], dim=1)
        for n, x in args.items()
        if n != "initial_state"
    }
    mixed["initial_state"] = other["initial_state"] * 100
    if gate != "none":
        mixed["log_decay"][:, :40] *= 3000
    o, state = gated_delta_rule(**args, segment_ids=ids)
    changed, same = gated_delta_rule(**mixed, segment_ids=ids)
    assert torch.equal(o[:, 40:], changed[:, 40:]) and torch.equal(state, same)
    assert not torch.equal(o[:, :40], changed[:, :40])


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("split", [1, 30, 64, 100])
def test_carried_state(gate: str, split: int) -> None:
    args = make(130, gate)
    o, state = gated_delta_rule(**args)
    first, middle = gated_delta_rule(**cut(args, 0, split))
    second, last = gated_delta_rule(**cut(args, split, 130, initial_state=middle))
    assert_ratio("o", torch.cat([first, second], dim=1), o, 1e-12)
    assert_ratio("state", last, state, 1e-12)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("position", [5, 63, 64, 100])
def test_causal(gate: str, position: int) -> None:
    args = make(130, gate)
    leaves = {n: x.requires_grad_() for n, x in args.items() if x is not None}
    o, _ = gated_delta_rule(**leaves)
    timed = [n for n in leaves if n != "initial_state"]
    grads = torch.autograd.grad(o[:, position].sum(), [leaves[n] for n in timed])
    for name, grad in zip(timed, grads, strict=True):
        assert grad[:, position + 1 :].abs().max() == 0, name
        assert grad[:, : position + 1].abs().max() > 0, name


@pytest.mark.parametrize("gate", ["head", "key"])
@pytest.mark.parametrize("decay", [*EXTREMES, "mixed"])
@pytest.mark.parametrize(
    ("dtype", "limit", "gradient_limit"),
    [(torch.float32, 1e-5, 1e-5), (torch.bfloat16, 1e-2, 1.5e-2)],
)
def test_extreme_gates(
    gate: str, decay: float | str, dtype: torch.dtype, limit: float, gradient_limit: float
) -> None:
    args = make(130, gate, key=32)
    if decay == "mixed":
        choice = torch.randint(
            4, args["log_decay"].shape, generator=torch.Generator().manual_seed(1)
        )
        # mostly weak decay, so that much is remembered right behind a strong one
        choice = torch.where(choice < 2, choice, torch.where(choice.roll(3, 1) == 2, choice, 1))
        args["log_decay"] = torch.tensor(EXTREMES, dtype=torch.float64)[choice]
    else:
        args["log_decay"] = torch.full_like(args["log_decay"], decay)
    rounded = cast(args, dtype)
    chunked = run_with_gradients(rounded, backend="chunked")
    reference = run_with_gradients(cast(rounded, torch.float64), backend="reference")
    for name, expected in reference.items():
        assert chunked[name].isfinite().all(), name
        allowed = gradient_limit if name.startswith("d_") else limit
        vanished = (chunked[name].double() - expected).abs().max() <= 1e-6
        assert vanished or error_ratio(chunked[name], expected) <= allowed, name


def test_equal_gates_per_key_are_one_gate() -> None:
    args = make(130, "head")
    gate = args["log_decay"]
    repeated = args | {"log_decay": gate.unsqueeze(-1).expand(*gate.shape, 16)}
    head, key = run_with_gradients(args), run_with_gradients(repeated)
    key["d_log_decay"] = key["d_log_decay"].sum(-1)
    assert_same(key, head, 1e-12)


@pytest.mark.parametrize("gate", ["head", "key"])
def test_beta_zero_reads_the_decayed_state(gate: str) -> None:
    args = make(100, gate)
    args["beta"] = torch.zeros_like(args["beta"])
    o, state = gated_delta_rule(**args, scale=1.0)
    decay = args["log_decay"].cumsum(1).exp()
    decay = decay.unsqueeze(-1) if gate == "head" else decay
    states = decay.unsqueeze(-1) * args["initial_state"].unsqueeze(1)
    assert_ratio("o", o, torch.einsum("bthk,bthkv->bthv", args["q"], states), 1e-12)
    assert_ratio("state", state, states[:, -1], 1e-12)


def test_exact_recall_and_last_write_wins() -> None:
    generator = torch.Generator().manual_seed(0)
    keys = torch.linalg.qr(torch.randn(16, 16, generator=generator, dtype=torch.float64))[0]
    v = torch.randn(1, 80, 1, 8, generator=generator, dtype=torch.float64)
    k = keys.repeat(5, 1).view(1, 80, 1, 16)
    beta = torch.ones(1, 80, 1, dtype=torch.float64)
    o, state = gated_delta_rule(k, k, v, beta, scale=1.0)
    torch.testing.assert_close(o, v)
    torch.testing.assert_close(keys @ state[0, 0], v[0, 64:, 0])


def test_beta_two_reflects() -> None:
    args = make(130, "none", beta=(2.0, 2.0))
    args["v"] = torch.zeros_like(args["v"])
    _, state = gated_delta_rule(**args)
    norm, start = torch.linalg.norm(state), torch.linalg.norm(args["initial_state"])
    torch.testing.assert_close(norm, start)
    twice = {n: None if x is None else x for n, x in cut(args, 0, 1).items()}
    twice = {
        n: x if x is None or n == "initial_state" else x.expand(-1, 2, *x.shape[2:])
        for n, x in twice.items()
    }
    torch.testing.assert_close(gated_delta_rule(**twice)[1], args["initial_state"])


@pytest.mark.parametrize("gate", GATES)
def test_gradcheck(gate: str) -> None:
    args = make(5, gate, batch=1, groups=1, heads=2, key=3, value=2)
    given = {n: x.requires_grad_() for n, x in args.items() if x is not None}
    ids = torch.tensor([[0, 0, 0, 1, 1]])
    for options in ({}, {"segment_ids": ids}, {"chunk_size": 2}):

        def function(*tensors: Tensor, options: dict = options) -> tuple[Tensor, Tensor]:
            return gated_delta_rule(**dict(zip(given, tensors, strict=True)), **options)

        assert torch.autograd.gradcheck(function, tuple(given.values()), fast_mode=True)


@pytest.mark.parametrize("similar", [False, True])
@pytest.mark.parametrize("size", [1, 2, 16, 32, 64, 128])
def test_inverse(size: int, similar: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(3, size, 32, generator=generator)
    k = normalize(0.1 * noise + 1 if similar else noise, dim=-1)
    lower = (-2 * k @ k.mT).tril(-1)
    junk = torch.full_like(lower, float("nan")).triu()
    inverse = invert_unit_lower(lower + junk)
    unit = torch.eye(size)
    assert torch.equal(inverse, inverse.tril())
    if not similar:
        assert ((inverse @ (unit - lower)) - unit).abs().max() < 1e-5
    assert_ratio("inverse", inverse, torch.linalg.inv((unit - lower).double()), 1e-5)


def test_autocast_does_not_touch_it() -> None:
    args = cast(make(70), torch.float32)
    plain = run_with_gradients(args)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = run_with_gradients(args)
    for name, x in plain.items():
        assert torch.equal(inside[name], x), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": torch.zeros(2, 4, 3, 16)}, "heads of v must be a multiple of the heads of k, got 3"),
        ({"k": torch.zeros(2, 5, 2, 16)}, "k must be (2, 4, G, K) to fit v, got (2, 5, 2, 16)"),
        ({"q": torch.zeros(2, 4, 2, 8)}, "q must have shape (2, 4, 2, 16), got (2, 4, 2, 8)"),
        ({"beta": torch.zeros(2, 4)}, "beta must have shape (2, 4, 2), got (2, 4)"),
        ({"log_decay": torch.zeros(2, 4, 2, 8)}, "log_decay must have shape (2, 4, 2, 16)"),
        ({"log_decay": torch.zeros(4, 2)}, "log_decay must have shape (2, 4, 2), got (4, 2)"),
        ({"initial_state": torch.zeros(2, 2, 8, 16)}, "initial_state must have shape"),
        ({"segment_ids": torch.zeros(2, 3).long()}, "segment_ids must have shape (2, 4)"),
        ({"segment_ids": torch.zeros(2, 4)}, "segment_ids must be integers, got torch.float32"),
        ({"v": torch.zeros(2, 0, 2, 8)}, "v must be (B, T, H, V) with T >= 1, got (2, 0, 2, 8)"),
        ({"v": torch.zeros(2, 4, 2, 8).long()}, "v must be of a floating point dtype"),
        ({"chunk_size": 48}, "chunk_size must be a power of two, got 48"),
        ({"backend": "fast"}, "backend 'fast' is not available"),
    ],
)
def test_bad_arguments(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        gated_delta_rule(**make(4) | changes)


@pytest.mark.parametrize(("gate", "packed"), [("head", True), ("key", False)])
def test_traces_without_graph_breaks(gate: str, packed: bool) -> None:
    args = make(15, gate, batch=1, groups=1, heads=2)
    ids = (torch.arange(15) >= 11).long().unsqueeze(0) if packed else None
    options = {"chunk_size": 8, "segment_ids": ids}
    given = {n: x for n, x in args.items() if x is not None}
    torch.compiler.reset()
    compiled = torch.compile(gated_delta_rule, fullgraph=True, backend="aot_eager")

    def function(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return compiled(**dict(zip(given, tensors, strict=True)), **options)

    outputs, grads = gradients(function, list(given.values()))
    traced = dict(zip(("o", "state", *(f"d_{n}" for n in given)), (*outputs, *grads), strict=True))
    assert_same(traced, run_with_gradients(args, **options), 1e-12)
