"""The conformance suite: what holds for every sequence mixer, whoever wrote it.

Use: `@pytest.mark.parametrize("check", CHECKS)` over `check(Case("name", {options}))`. A mixer
that passes is causal, resets between documents, streams, and costs what it says.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from rondo.models import MIXERS, Mixer, ModelConfig, SequenceContext
from rondo.models.config import LayerSpec, make_options
from rondo.models.init import initial_values
from rondo.models.mixer import State
from rondo.tests.numerics import assert_ratio, gradients

OPERATORS = ("scan", "conv", "attend")
LONG = 150  # more than two chunks of 64, and not a multiple of one
ROUNDING = {torch.float64: 1.0, torch.float32: 1e6}
"""By how much more than in float64 results may differ; gradients that cancel have little else."""
BACKENDS = {"cpu": ("chunked",), "cuda": ("chunked", "auto")}
"""Those held against the reference: "auto" takes kernels on a GPU, for what they serve."""


@dataclass(frozen=True)
class Case:
    """A mixer with options, in a small model."""

    mixer: str
    options: dict[str, Any] = field(default_factory=dict)
    dim: int = 32
    device: str = "cpu"
    dtype: torch.dtype = torch.float64
    """Of what is compared; float32 is what kernels for GPUs take."""

    def __str__(self) -> str:
        return "-".join([self.mixer, *(f"{k}={v}" for k, v in self.options.items())])

    def near(self, name: str, actual: Tensor, expected: Tensor, limit: float) -> None:
        """Fails above `limit`, which is for float64."""
        assert_ratio(name, actual, expected, limit * ROUNDING[self.dtype])

    def documents(self, starts: int, other: int = 1) -> Tensor:
        """Ids of two rows of LONG tokens whose second document `other` starts at `starts`."""
        ids = torch.zeros(2, LONG, dtype=torch.long, device=self.device)
        ids[:, starts:] = other
        return ids


def build(case: Case, dtype: torch.dtype | None = None) -> tuple[Mixer, dict[str, Tensor]]:
    """The mixer of layer 1 of 3, with livelier weights than a fresh model's, and what its shared
    modules say. Parameters are the same numbers in every dtype (without one, the case's)."""
    config = ModelConfig(dim=case.dim, num_layers=3, pattern=[case.mixer], init_std=0.3)
    config.mixers = {case.mixer: case.options}
    spec: LayerSpec = config.layers()[1]
    options = make_options(spec.mixer, spec.options)
    mixer = MIXERS[spec.mixer](config, options, 1)
    shared = nn.ModuleDict(MIXERS[spec.mixer].shared_modules(config, options))
    with torch.no_grad():
        for module in (mixer, shared):
            params = dict(module.named_parameters())
            for name, value in initial_values(module, seed=5):
                params[name].copy_(value)
            module.to(case.device, dtype or case.dtype)
    return mixer, {name: module() for name, module in shared.items()}


def inputs(case: Case, batch: int, time: int, dtype: torch.dtype | None = None) -> Tensor:
    """Random activations, the same numbers in every dtype (without one, the case's)."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(batch, time, case.dim, generator=generator, dtype=torch.float64)
    return x.to(case.device, dtype or case.dtype)


def context(
    x: Tensor, shared: dict[str, Tensor], start: int = 0, segment_ids: Tensor | None = None
) -> SequenceContext:
    """Context of `x` when it begins at position `start` of its document."""
    if segment_ids is None:
        index = torch.arange(start, start + x.shape[1]).expand(x.shape[:2])
    else:
        lengths = [row.unique(return_counts=True)[1] for row in segment_ids.cpu()]
        index = torch.stack([torch.cat([torch.arange(int(n)) for n in row]) for row in lengths])
    return SequenceContext(index.to(x.device), segment_ids, shared)


@contextmanager
def backend(mixer: Mixer, name: str) -> Iterator[None]:
    """Runs every operator of `mixer` on one backend."""
    before = {op: getattr(mixer, op) for op in OPERATORS if hasattr(mixer, op)}
    for op, function in before.items():
        if "backend" in inspect.signature(function).parameters:
            setattr(mixer, op, functools.partial(function, backend=name))
    try:
        yield
    finally:
        for op, function in before.items():
            setattr(mixer, op, function)


def backends_agree(case: Case) -> None:
    """Reference and others: output, and gradients of the input and of every parameter."""
    mixer, shared = build(case)
    names = [name for name, _ in mixer.named_parameters()]
    backends = BACKENDS[case.device]

    def run(x: Tensor, *params: Tensor) -> list[Tensor]:
        values = dict(zip(names, params, strict=True))
        return [torch.func.functional_call(mixer, values, (x, context(x, shared)))[0]]

    for time in (1, 7, LONG):
        x = inputs(case, 2, time)
        results = {}
        for name in ("reference", *backends):
            with backend(mixer, name):
                outputs, grads = gradients(run, [x, *mixer.parameters()])
                results[name] = [*outputs, *grads]
        for name in backends:
            for part, expected, actual in zip(
                ["output", "x", *names], results["reference"], results[name], strict=True
            ):
                case.near(f"{part} of {name} at T={time}", actual, expected, 1e-8)


def documents_are_separate(case: Case) -> None:
    """Packed documents equal separate sequences, and the first cannot touch the second."""
    mixer, shared = build(case)
    first = 71  # longer than a chunk, ends inside one
    x = inputs(case, 2, LONG)
    segments = case.documents(first)
    packed, state = mixer(x, context(x, shared, segment_ids=segments))
    for part in (slice(0, first), slice(first, LONG)):
        alone, alone_state = mixer(x[:, part], context(x[:, part], shared))
        case.near(f"document {part}", packed[:, part], alone, 1e-9)
    for name in alone_state:
        if name.split(".")[-1] in ("k", "v"):  # a cache keeps more than it may still read
            continue
        case.near(f"state {name}", state[name], alone_state[name], 1e-9)
    # Bit for bit, in the precision of real runs.
    mixer, shared = build(case, torch.float32)
    x = x.float()
    ctx = context(x, shared, segment_ids=segments)
    changed = x.clone()
    changed[:, :first] = 3.0
    if not _untouched(mixer, mixer(changed, ctx)[0][:, first:], mixer(x, ctx)[0][:, first:]):
        raise AssertionError("changing document 1 changed document 2")


def prefix_is_invariant(case: Case) -> None:
    """No output depends on a later token; every token can change its own output."""
    mixer, shared = build(case)
    x = inputs(case, 1, LONG)
    expected, _ = mixer(x, context(x, shared))
    for time in (0, 63, 64, 100, LONG - 1):
        changed = x.clone()
        changed[:, time] += 1.0
        actual, _ = mixer(changed, context(x, shared))
        if not _untouched(mixer, actual[:, :time], expected[:, :time]):
            raise AssertionError(f"an output before position {time} depends on it")
        if torch.equal(actual[:, time], expected[:, time]):
            raise AssertionError(f"the output at position {time} does not depend on its input")


def state_carries_over(case: Case) -> None:
    """Two stretches with carried state equal the whole, packed documents in the second or not."""
    mixer, shared = build(case)
    x = inputs(case, 2, LONG)
    segments = case.documents(120, 3)
    for cut in (1, 64, 77):
        for ids in (None, segments):
            ctx = context(x, shared, segment_ids=ids)
            expected, last = mixer(x, ctx)
            outputs, state = [], None
            for part in (slice(0, cut), slice(cut, LONG)):
                piece = SequenceContext(
                    ctx.positions[:, part], None if ids is None else ids[:, part], shared
                )
                y, state = mixer(x[:, part], piece, state)
                outputs.append(y)
            case.near(f"cut at {cut}", torch.cat(outputs, 1), expected, 1e-9)
            _same_state(case, state, last)


def decode_equals_prefill(case: Case) -> None:
    """Token by token with state equals all at once, and the state has the shape it says."""
    mixer, shared = build(case)
    x = inputs(case, 2, 70)
    expected, last = mixer(x, context(x, shared))
    state, outputs = None, []
    for t in range(x.shape[1]):
        y, state = mixer(x[:, t : t + 1], context(x[:, t : t + 1], shared, t), state)
        outputs.append(y)
    case.near("decode", torch.cat(outputs, 1), expected, 1e-9)
    _same_state(case, state, last)
    shapes = mixer.state_shapes(2, x.shape[1])
    for name, (shape, _) in shapes.items():
        if tuple(state[name].shape) != shape:
            raise AssertionError(f"state {name} is {tuple(state[name].shape)}, not {shape}")


def gradients_flow_through_state(case: Case) -> None:
    """A loss on the second stretch reaches the inputs of the first as it does in one piece."""
    mixer, shared = build(case)
    x = inputs(case, 1, 90)

    def whole(x: Tensor) -> list[Tensor]:
        return [mixer(x, context(x, shared))[0][:, 70:]]

    def halves(x: Tensor) -> list[Tensor]:
        _, state = mixer(x[:, :70], context(x[:, :70], shared))
        return [mixer(x[:, 70:], context(x[:, 70:], shared, 70), state)[0]]

    (_, [expected]), (_, [actual]) = gradients(whole, [x]), gradients(halves, [x])
    case.near("gradient of x", actual, expected, 1e-8)


def bfloat16_stays_close(case: Case) -> None:
    """bfloat16 activations over float32 parameters drift from float64 within 5%."""
    exact, exact_shared = build(case, torch.float64)
    mixer, shared = build(case, torch.float32)
    x = inputs(case, 2, LONG, torch.float64)
    expected, _ = exact(x, context(x, exact_shared))
    x16 = x.bfloat16()
    actual, state = mixer(x16, context(x16, shared))
    if actual.dtype != torch.bfloat16:
        raise AssertionError(f"output is {actual.dtype}, not bfloat16")
    assert_ratio("bfloat16 output", actual, expected, 5e-2)
    if "recurrent" in state and state["recurrent"].dtype != torch.float32:
        raise AssertionError(f"recurrent state is {state['recurrent'].dtype}, not float32")


def sharding_is_complete(case: Case) -> None:
    """Every parameter is covered by exactly one word of `sharding`, and float32 names exist."""
    mixer, _ = build(case)
    words = {"column", "row", "head", "replicate"}
    if set(mixer.sharding.values()) - words:
        raise AssertionError(f"unknown sharding words in {mixer.sharding}")
    for name, _ in mixer.named_parameters():
        covering = [word for word in mixer.sharding if f"{name}.".startswith(f"{word}.")]
        if len(covering) != 1:
            raise AssertionError(f"sharding covers {name} by {covering or 'nothing'}")
    for name in mixer.float32_parameters:
        mixer.get_parameter(name)
    heads = mixer.heads(mixer.config, mixer.options)
    if not heads or not all(isinstance(n, int) and n > 0 for n in heads.values()):
        raise AssertionError(f"heads() must count what ranks may divide, got {heads}")


def cost_is_counted(case: Case) -> None:
    """`cost()` equals the parameters, the linear layers by their sizes, and the bytes of the
    state of a bfloat16 run; the FLOPs of the operators are no more than what the chunked forms
    execute, and no less than a sixteenth of it. Counted on a CPU for every device: on a GPU the
    counter sees no kernels, and attention computes what a window hides."""
    case = dataclasses.replace(case, device="cpu")
    mixer, shared = build(case, torch.float32)
    time = 256
    x = inputs(case, 1, time, torch.float32)
    cost = mixer.cost(time)
    if cost.parameters != sum(p.numel() for p in mixer.parameters()):
        raise AssertionError(f"parameters: {cost.parameters}")
    with FlopCounterMode(display=False) as counter:
        mixer(x, context(x, shared))
    counted = counter.get_total_flops() / time
    linear = cost.flops - mixer.operator_flops(time)
    operators = mixer.operator_flops(time)
    # The counter sees matrix products only: not convolutions (8 a channel and tap of 4), scans.
    elementwise = 64 * case.dim
    if not (counted - linear) / 16 <= operators <= counted - linear + elementwise:
        raise AssertionError(f"operators: {operators} FLOPs a token, counted {counted - linear}")
    weights = {id(p) for m in mixer.modules() if type(m).__name__ == "Linear" for p in [m.weight]}
    expected = sum(2 * p.numel() for p in mixer.parameters() if id(p) in weights)
    if linear != expected:
        raise AssertionError(f"linear layers: {linear} FLOPs a token, {expected} by their sizes")
    x = x.bfloat16()
    _, state = mixer(x, context(x, shared))
    held = sum(value.numel() * value.itemsize for value in state.values())
    if cost.state_bytes != held:
        raise AssertionError(f"state: {cost.state_bytes} bytes, held {held}")


def _untouched(mixer: Mixer, actual: Tensor, expected: Tensor) -> bool:
    """To the last bit, or of a solver within ten times the tolerance that it stops at."""
    if mixer.exact or not len(actual[0]):
        return torch.equal(actual, expected)
    limit = {torch.float32: 1e-5, torch.float64: 1e-11}[actual.dtype]
    error, size = (x.detach().abs().max() for x in (actual - expected, expected))
    return float(error) <= limit * float(size)


def _same_state(case: Case, actual: State, expected: State) -> None:
    if actual.keys() != expected.keys():
        raise AssertionError(f"states hold {set(actual)} and {set(expected)}")
    for name, value in expected.items():
        if value.is_floating_point():
            case.near(f"state {name}", actual[name], value, 1e-9)
        elif not torch.equal(actual[name], value):
            raise AssertionError(f"state {name}: {actual[name]} instead of {value}")


CHECKS: list[Callable[[Case], None]] = [
    backends_agree,
    documents_are_separate,
    prefix_is_invariant,
    state_carries_over,
    decode_equals_prefill,
    gradients_flow_through_state,
    bfloat16_stays_close,
    sharding_is_complete,
    cost_is_counted,
]
