"""The Triton gated delta rule against the reference, in the interpreter where there is no GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from rondo.kernels.delta_rule import gated_delta_rule, gated_delta_rule_summary
from rondo.kernels.delta_rule.triton_calls import LARGEST_CHUNK
from rondo.tests.kernels.delta_rule_cases import EXTREMES, cast, make, run_with_gradients
from rondo.tests.numerics import assert_ratio, error_ratio, gradients

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GATES = ("none", "head", "key")
pytestmark = pytest.mark.usefixtures("poisoned_memory")


def on_device(args: dict[str, Tensor | None], dtype: torch.dtype) -> dict[str, Tensor | None]:
    return {n: None if x is None else x.to(DEVICE) for n, x in cast(args, dtype).items()}


def compare(
    args: dict[str, Tensor | None],
    dtype: torch.dtype = torch.float32,
    limit: float = 1e-5,
    gradient_limit: float = 1e-5,
    **options: Any,
) -> None:
    """The kernels in `dtype` against the reference in float64 on the same rounded inputs."""
    args = on_device(args, dtype)
    actual = run_with_gradients(args, backend="triton", **options)
    wide = on_device(args, torch.float64)
    expected = run_with_gradients(wide, backend="reference", **options)
    assert actual["o"].dtype == dtype and actual["state"].dtype == torch.float32
    for name, x in expected.items():
        assert_ratio(name, actual[name], x, gradient_limit if name.startswith("d_") else limit)


def ids(*lengths: int) -> Tensor:
    return torch.repeat_interleave(torch.arange(len(lengths)) * 3 + 5, torch.tensor(lengths))


@pytest.mark.parametrize("gate", GATES)
def test_grouped_heads_and_odd_sizes(gate: str) -> None:
    args = make(19, gate, batch=1, groups=1, heads=2, key=20, value=12, beta=(0.0, 2.0))
    compare(args)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize(("key", "value"), [(80, 40), (144, 24)])
def test_several_tiles_of_keys(gate: str, key: int, value: int) -> None:
    """The last of them, of keys and of values, not full."""
    args = make(19, gate, batch=1, groups=1, heads=1, key=key, value=value, beta=(0.0, 2.0))
    compare(args, chunk_size=16)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("gate", "dtype"), [*((g, torch.float32) for g in GATES), ("head", torch.bfloat16)]
)
def test_the_widest_heads(gate: str, dtype: torch.dtype) -> None:
    """From a state, through two chunks and documents that end in each."""
    exact = dtype == torch.float32
    args = make(21, gate, batch=1, groups=1, heads=1, key=256, value=256, beta=(0.0, 1.0 + exact))
    limits = (1e-5, 1e-5) if exact else (6e-3, 8e-3)
    compare(args, dtype, *limits, segment_ids=ids(7, 11, 3)[None].to(DEVICE), chunk_size=16)


@pytest.mark.quick
@pytest.mark.parametrize("gate", GATES)
def test_documents_that_start_anywhere(gate: str) -> None:
    args = make(20, gate, batch=2, groups=1, heads=1)
    rows = torch.stack([ids(1, 12, 1, 4, 2), ids(20)]).to(DEVICE)
    compare(args, segment_ids=rows, chunk_size=16)


@pytest.mark.parametrize("gate", GATES)
def test_all_blocks_of_the_largest_chunk(gate: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32, where an error of one block shows; there chunks are shorter otherwise."""
    monkeypatch.setitem(LARGEST_CHUNK, torch.float32, 64)
    args = make(52, gate, batch=1, groups=1, heads=1, beta=(0.0, 2.0))
    compare(args, segment_ids=ids(40, 12)[None].to(DEVICE))


@pytest.mark.parametrize("gate", GATES)
def test_bfloat16(gate: str) -> None:
    compare(make(24, gate, batch=1, groups=1, heads=1), torch.bfloat16, 6e-3, 8e-3)


@pytest.mark.parametrize("gate", GATES)
def test_bfloat16_over_chunks(gate: str) -> None:
    """Of two blocks each, with documents that end inside them: states pass through memory."""
    rows = ids(9, 20, 16)[None].to(DEVICE)
    args = make(45, gate, batch=1, groups=1, heads=1)
    compare(args, torch.bfloat16, 6e-3, 8e-3, segment_ids=rows, chunk_size=32)


@pytest.mark.quick
@pytest.mark.parametrize("gate", GATES)
def test_one_position(gate: str) -> None:
    args = make(1, gate, batch=1, groups=1, heads=2, key=20, value=12, beta=(0.0, 2.0))
    compare(args)
    narrow = on_device(args, torch.float32)
    o, state = gated_delta_rule(**narrow, backend="triton")
    expected, last = gated_delta_rule(**on_device(args, torch.float64), backend="reference")
    assert_ratio("o", o, expected, 1e-6)
    assert_ratio("state", state, last, 1e-6)


@pytest.mark.parametrize("gate", GATES[1:])
@pytest.mark.parametrize("decay", [0.0, float("-inf"), "mixed"])
def test_extreme_gates(gate: str, decay: float | str) -> None:
    args = make(18, gate, batch=1, groups=1, heads=1)
    if decay == "mixed":
        generator = torch.Generator().manual_seed(1)
        choice = torch.randint(4, args["log_decay"].shape, generator=generator)
        # mostly weak decay, so that much is remembered right behind a strong one
        choice = torch.where(choice < 2, choice, torch.where(choice.roll(3, 1) == 2, choice, 1))
        args["log_decay"] = torch.tensor(EXTREMES, dtype=torch.float64)[choice]
    else:
        args["log_decay"] = torch.full_like(args["log_decay"], decay)
    args = on_device(args, torch.float32)
    actual = run_with_gradients(args, backend="triton", chunk_size=16)
    expected = run_with_gradients(on_device(args, torch.float64), backend="reference")
    for name, x in expected.items():
        assert actual[name].isfinite().all(), name
        vanished = (actual[name].double() - x).abs().max() <= 1e-6
        assert vanished or error_ratio(actual[name], x) <= 1e-5, name


@pytest.mark.parametrize("gate", GATES)
def test_nothing_leaks_into_the_next_document(gate: str) -> None:
    rows = ids(20, 14)[None].to(DEVICE)
    args = on_device(make(34, gate, batch=1, groups=1, heads=1), torch.float32)
    other = on_device(make(34, gate, batch=1, groups=1, heads=1, seed=1), torch.float32)
    mixed = {
        n: None if x is None else torch.cat([other[n][:, :20], x[:, 20:]], dim=1)
        for n, x in args.items()
        if n != "initial_state"
    }
    if gate != "none":
        mixed["log_decay"][:, :20] *= 3000
    o, state = gated_delta_rule(**args, segment_ids=rows, backend="triton")
    changed, same = gated_delta_rule(**mixed, segment_ids=rows, backend="triton")
    assert torch.equal(o[:, 20:], changed[:, 20:]) and torch.equal(state, same)
    assert not torch.equal(o[:, :20], changed[:, :20])


@pytest.mark.parametrize(
    ("gate", "dtype", "key"),
    [
        *((gate, torch.float32, 16) for gate in GATES),
        ("head", torch.bfloat16, 16),
        pytest.param("key", torch.bfloat16, 144, marks=pytest.mark.slow),
    ],
)
def test_summary(gate: str, dtype: torch.dtype, key: int) -> None:
    args = on_device(make(17, gate, batch=1, groups=1, heads=1, key=key, beta=(0.0, 2.0)), dtype)
    del args["q"], args["initial_state"]
    names = [n for n, x in args.items() if x is not None]

    def run(backend: str, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        given = dict(zip(names, tensors, strict=True))
        return gated_delta_rule_summary(**given, chunk_size=16, backend=backend)

    given = [args[n] for n in names]
    actual, grads = gradients(lambda *x: run("triton", *x), given)
    expected, wide = gradients(lambda *x: run("chunked", *x), [x.double() for x in given])
    for name, a, e in zip(("transition", "state"), actual, expected, strict=True):
        assert a.dtype == torch.float32
        assert_ratio(name, a, e, 1e-5)
    for name, a, e in zip(names, grads, wide, strict=True):
        assert_ratio(name, a, e, 1e-5 if a.dtype == torch.float32 else 3e-3)


def test_traces_without_graph_breaks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # a compiler makes tensors without values of its own
    args = on_device(make(5, "head", batch=1, groups=1, heads=1), torch.float32)
    names = list(args)

    def run(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return gated_delta_rule(**dict(zip(names, tensors, strict=True)), backend="triton")

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    expected, grads = gradients(run, list(args.values()))
    actual, same = gradients(compiled, list(args.values()))
    torch.testing.assert_close((actual, same), (expected, grads))


@pytest.mark.quick
def test_refusals() -> None:
    args = make(2, key=257)
    with pytest.raises(ValueError, match="cannot run: it takes keys of 1 to 256 numbers, got 257"):
        gated_delta_rule(**cast(args, torch.float32), backend="triton")
    with pytest.raises(ValueError, match=r"cannot run: it takes float32, .* got float64"):
        gated_delta_rule(**make(2), backend="triton")
