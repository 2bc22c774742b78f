"""Titans' architectures without their memory are the attention that they are built on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rondo.kernels.memory_context import ContextOutput
from rondo.models import Decoder, ModelConfig, from_preset, preset_names
from rondo.models.mixers.attention import Attention, AttentionOptions
from rondo.tests.mixer_suite import Case, build, context, inputs
from rondo.tests.numerics import assert_ratio

KINDS = {
    "lmm": {"titans_memory"},
    "mac": {"titans_mac"},
    "mag": {"titans_mag"},
    "mal": {"titans_memory", "attention"},
}
FREE = ("titans_memory", "titans_mac")
"""Mixers without a window."""
WEIGHTS = {
    "titans_memory": "memory",
    "titans_mac": "context",
    "titans_mag": "memory.memory",
    "lact": "weights",
}
"""What of a state the learnt weights are."""


def attention_with(mixer: Any, window: int | None, persistent_tokens: int) -> Attention:
    """An attention layer with the weights of a mixer's attention, and its output matrix."""
    options = AttentionOptions(
        num_heads=4, head_dim=8, window=window, persistent_tokens=persistent_tokens
    )
    other = Attention(mixer.config, options, 1).double()
    weights = dict(mixer.attention.named_parameters())
    other.load_state_dict({**weights, "o_proj.weight": mixer.o_proj.weight})
    return other


def gate_half(mixer: Any) -> None:
    """Turns the gate into 1/2 and the norm before it into none."""
    mixer.memory_norm.weight.data.zero_()
    mixer.attention_norm.operator = lambda x, weight, eps: 2 * x


@pytest.mark.parametrize("persistent_tokens", [0, 3])
@pytest.mark.parametrize("window", [9, 40, None])
def test_mag_with_an_open_gate_is_window_attention_with_a_prefix(
    window: int | None, persistent_tokens: int
) -> None:
    options = {"head_dim": 8, "window": window, "persistent_tokens": persistent_tokens}
    mixer, shared = build(Case("titans_mag", options))
    gate_half(mixer)
    x = inputs(Case("titans_mag"), 2, 40)
    ctx = context(x, shared)
    seen = None if window == 40 else window  # a window as long as the row hides nothing
    expected, _ = attention_with(mixer, seen, persistent_tokens)(x, ctx)
    assert_ratio("output", mixer(x, ctx)[0], expected, 1e-12)


@pytest.mark.parametrize("persistent_tokens", [0, 3])
def test_mac_without_memory_is_attention_within_segments_with_a_prefix(
    persistent_tokens: int,
) -> None:
    options = {"head_dim": 8, "segment_size": 16, "persistent_tokens": persistent_tokens}
    mixer, shared = build(Case("titans_mac", options))
    gate_half(mixer)

    def without_memory(q: Tensor, o: Tensor, *others: Any, **options: Any) -> ContextOutput:
        state: Any = (torch.zeros(1), torch.zeros(1))
        return ContextOutput(torch.cat([o, torch.zeros_like(o)], -1), state, torch.zeros(1).long())

    mixer.scan = without_memory
    x = inputs(Case("titans_mac"), 2, 40)
    actual, _ = mixer(x, context(x, shared))
    plain = attention_with(mixer, None, persistent_tokens)
    for start in range(0, 40, 16):
        part = x[:, start : start + 16]
        ctx = context(part, shared, start)
        expected, _ = plain(part, ctx)
        assert_ratio(f"segment {start}", actual[:, start : start + 16], expected, 1e-12)


def test_memory_as_a_layer_is_a_pattern() -> None:
    """MAL: a memory without channel mixer, then window attention; it decodes as it trains."""
    config = ModelConfig(
        vocab_size=17,
        dim=32,
        num_layers=4,
        pattern=["titans_memory+none", "window"],
        mixers={
            "titans_memory": {"head_dim": 8, "chunk_size": 4},
            "window": {"kind": "attention", "window": 8, "persistent_tokens": 2},
        },
    )
    model = Decoder(config, seed=1).double().eval()
    tokens = torch.arange(30)[None] * 5 % 17
    whole = model(tokens).hidden
    state, pieces = None, []
    for t in range(30):
        output = model(tokens[:, t : t + 1], state=state)
        state = output.state
        pieces.append(output.hidden)
    assert_ratio("decode", torch.cat(pieces, 1), whole, 1e-9)


@pytest.mark.parametrize("name", ["titans_memory", "titans_mac", "titans_mag", "lact"])
def test_decoding_goes_on_learning(name: str) -> None:
    """What is read one token at a time changes weights and what later tokens find."""
    options = {"head_dim": 8, "chunk_size": 4}
    if name == "titans_mac":
        options["segment_size"] = 8
    if name == "lact":
        options = {"num_heads": 4, "num_fast_heads": 2, "chunk_size": 4, "init_rank": 4}
    case = Case(name, {**options, **({} if name in FREE else {"window": 4})})
    mixer, shared = build(case)
    x = inputs(case, 1, 25)

    def decode(x: Tensor) -> tuple[Tensor, list[Tensor]]:
        state, held = None, []
        for t in range(x.shape[1]):
            y, state = mixer(x[:, t : t + 1], context(x[:, t : t + 1], shared, t), state)
            held.append(state[WEIGHTS[name]].clone())
        return y, held

    last, held = decode(x)
    assert not torch.equal(held[11], held[15]) and not torch.equal(held[15], held[23])
    other = x.clone()
    other[:, 9] += 1  # far outside windows, segments and convolutions of the last token
    assert (decode(other)[0] - last).abs().max() > 1e-8


def test_every_size_of_the_paper_is_a_preset() -> None:
    names = {f"titans-{kind}-{size}" for kind in KINDS for size in ("170m", "340m", "400m", "760m")}
    assert names | {"titans-hybrid-1.3b", "titans-hybrid-7b"} <= set(preset_names())
    for name in names:
        mixers = [layer.mixer for layer in from_preset(name).layers()]
        assert set(mixers) == KINDS[name.split("-")[1]]


def test_memory_counts_as_state() -> None:
    """Weights at the chunk's start, weights and momentum, in float32, whatever the length."""
    options = {"head_dim": 16, "depth": 3, "expansion": 2.0}
    config = ModelConfig(
        vocab_size=9,
        dim=32,
        num_layers=2,
        pattern=["titans_memory"],
        mixers={"titans_memory": options},
    )
    numbers = 2 * 3 * (16 * 32 + 32 * 32 + 32 * 16)  # heads, copies, matrices
    conv = 3 * 3 * 32 * 2  # three convolutions, three inputs each, bfloat16
    model = Decoder(config, seed=0)
    for length in (64, 4096):
        assert model.cost(length).state_bytes == 2 * (4 * numbers + conv + 8)


@pytest.mark.parametrize(
    ("name", "rate", "options"),
    [("titans_mag", 500.0, {"window": 64}), ("titans_mac", 50.0, {"segment_size": 64})],
)
def test_gradients_of_a_hostile_memory_are_numbers(
    name: str, rate: float, options: dict[str, Any]
) -> None:
    """Depth 4, 4,096 tokens, steps far too long, no forgetting, weights thrice as large."""
    options = {"head_dim": 8, "depth": 4, "max_learning_rate": rate, **options}
    config = ModelConfig(
        vocab_size=64, dim=32, num_layers=1, pattern=[name], mixers={name: options}
    )
    model = Decoder(config, seed=0).train()
    for weight, parameter in model.named_parameters():
        if weight.endswith(("rate_bias", "decay_bias")):
            parameter.data.fill_(8.0)
        if ".layer_" in weight:
            parameter.data.mul_(3)
    words = torch.randint(64, (1, 4096), generator=torch.Generator().manual_seed(0))
    model(words).hidden.square().mean().backward()
    grads = [x.grad for x in model.parameters() if x.grad is not None]
    assert all(grad.isfinite().all() for grad in grads)
    assert any(bool(counter > 0) for _, counter in model.named_buffers() if counter.dim() == 0)
