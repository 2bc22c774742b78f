"""The decoder as a whole: documents, state, loss, initial values, generation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from rondo.models import MIXERS, Decoder, ModelConfig, generate
from rondo.models.generate import sample_token
from rondo.tests.numerics import assert_ratio

OPTIONS = {
    "attention": {"num_heads": 2},
    "mamba2": {"head_dim": 16, "state_dim": 8},
    "retnet": {"num_heads": 2},
    "hgrn2": {"head_dim": 8},
    "lact": {"num_heads": 2, "chunk_size": 16},
}


def every_mixer(**changes) -> Decoder:
    config = ModelConfig(
        **{
            "vocab_size": 61,
            "dim": 32,
            "num_layers": len(MIXERS),
            "pattern": sorted(MIXERS),
            "mixers": OPTIONS,
            "init_std": 0.1,
            **changes,
        }
    )
    return Decoder(config, seed=1).double()


def tokens(batch: int = 2, time: int = 140) -> torch.Tensor:
    return torch.randint(0, 61, (batch, time), generator=torch.Generator().manual_seed(3))


def test_packed_documents_equal_separate_ones() -> None:
    model, ids = every_mixer(), tokens()
    segments = torch.zeros_like(ids)
    segments[:, 75:] = 1
    packed = model(ids, segment_ids=segments).hidden
    for part in (slice(0, 75), slice(75, None)):
        assert_ratio("document", packed[:, part], model(ids[:, part]).hidden, 1e-9)
    joined = model(ids).hidden
    assert not torch.allclose(joined[:, 75:], packed[:, 75:], atol=1e-3)  # the reset matters


def test_streaming_equals_one_call() -> None:
    model, ids = every_mixer(), tokens()
    segments = torch.zeros_like(ids)
    segments[:, 60:] = 4
    for ids_of_documents in (None, segments):
        whole = model(ids, segment_ids=ids_of_documents)
        state, hidden = None, []
        for part in (slice(0, 30), slice(30, 31), slice(31, 100), slice(100, None)):
            piece = None if ids_of_documents is None else ids_of_documents[:, part]
            out = model(ids[:, part], segment_ids=piece, state=state)
            state = out.state
            hidden.append(out.hidden)
        assert_ratio("hidden", torch.cat(hidden, 1), whole.hidden, 1e-9)
        assert torch.equal(state.length, whole.state.length)


@pytest.mark.parametrize("cap", (None, 0.5))
def test_loss_is_the_cross_entropy_of_the_logits(cap: float | None) -> None:
    model, ids = every_mixer(tie_embeddings=True, logit_cap=cap), tokens(time=40)
    targets = ids.roll(-1, 1)
    targets[:, ::7] = -100
    hidden = model(ids).hidden
    logits = model.logits(hidden)
    plain = hidden @ model.embedding.weight.T
    assert torch.equal(logits, plain if cap is None else cap * torch.tanh(plain / cap))
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    actual = model.loss(ids, targets)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=0)
    expected.backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    actual.backward()
    for name, p in model.named_parameters():
        assert_ratio(name, p.grad, wanted[name], 1e-8)


def test_every_parameter_learns() -> None:
    model, ids = every_mixer(), tokens(time=40)
    model.loss(ids[:, :-1], ids[:, 1:]).backward()
    idle = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert idle == []


def test_initial_values_depend_on_seed_and_name_only() -> None:
    small, tall = every_mixer(num_layers=2), every_mixer(num_layers=4)
    a, b = small.state_dict(), tall.state_dict()
    for name in (
        "embedding.weight",
        "blocks.0.mixer.q_proj.weight",
        "blocks.1.mixer.q_proj.weight",
    ):
        assert torch.equal(a[name], b[name])
    config = small.config
    one, same, other = (Decoder(config, seed=seed) for seed in (7, 7, 8))
    assert torch.equal(one.head.weight, same.head.weight)
    assert not torch.equal(one.head.weight, other.head.weight)
    torch.manual_seed(5)
    first = Decoder(config).head.weight
    torch.manual_seed(5)
    assert torch.equal(first, Decoder(config).head.weight)


def test_residual_projections_start_smaller() -> None:
    model = Decoder(ModelConfig(vocab_size=300, dim=256, num_layers=8), seed=0)
    block = model.blocks["3"]
    assert block.mixer.q_proj.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert block.mixer.o_proj.weight.std().item() == pytest.approx(0.02 / 4, rel=0.02)
    assert block.ffn.down_proj.weight.std().item() == pytest.approx(0.02 / 4, rel=0.02)


def test_generation_equals_running_the_whole_prefix_each_time() -> None:
    model, prompt = every_mixer(), tokens(2, 5)
    out = generate(model, prompt, max_tokens=12, temperature=0)
    expected = prompt
    for _ in range(12):
        logits = model.logits(model(expected).hidden[:, -1])
        expected = torch.cat([expected, logits.argmax(-1, keepdim=True)], 1)
    assert torch.equal(out, expected)


def test_generation_draws_from_capped_logits() -> None:
    """Of 64 equal rows all draw one token where logits are far apart, many where a cap makes them
    almost equal."""
    drawn = []
    for cap in (None, 1e-3):
        model = every_mixer(num_layers=1, logit_cap=cap)
        with torch.no_grad():
            model.output_weight.mul_(1e4)
        prompt = tokens(1, 4).expand(64, -1)
        drawn.append(generate(model, prompt, max_tokens=1)[:, -1].unique().numel())
    assert drawn[0] == 1 and drawn[1] > 20


def test_generation_is_seeded_and_stops_at_eod() -> None:
    model, prompt = every_mixer(), tokens(3, 4)
    first = generate(model, prompt, max_tokens=10, seed=2)
    assert torch.equal(first, generate(model, prompt, max_tokens=10, seed=2))
    assert not torch.equal(first, generate(model, prompt, max_tokens=10, seed=3))
    alone = generate(model, prompt[:1], max_tokens=10, seed=2)[0]
    eod = int(alone[6])
    stopped = generate(model, prompt[:1], max_tokens=10, seed=2, eod=eod)[0]
    assert torch.equal(stopped, alone[: int((alone == eod).nonzero()[0]) + 1])
    with pytest.raises(ValueError, match="top_p"):
        generate(model, prompt, max_tokens=1, top_p=0)


def test_sampling_keeps_what_it_says() -> None:
    probabilities = torch.tensor([0.4, 0.3, 0.2, 0.1])
    logits = probabilities.log().expand(4000, 4)
    generator = torch.Generator().manual_seed(0)

    def seen(**options) -> set[int]:
        return set(sample_token(logits, generator, **options).tolist())

    assert seen() == {0, 1, 2, 3}
    assert seen(top_k=2) == {0, 1}
    assert seen(top_p=0.5) == {0, 1}
    assert seen(top_p=0.4) == {0}
    assert seen(temperature=0) == {0}
    counts = torch.bincount(sample_token(logits, generator)) / 4000
    torch.testing.assert_close(counts, probabilities, atol=0.03, rtol=0)


def test_bad_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="tokens"):
        every_mixer()(torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match="tokens"):
        every_mixer()(torch.zeros(3, 0, dtype=torch.long))


def test_cost_of_a_transformer_is_the_textbook_one() -> None:
    config = ModelConfig(vocab_size=1000, dim=64, num_layers=2, pattern=["attention"], ffn_dim=192)
    model = Decoder(config, seed=0)
    weights = 2 * (4 * 64 * 64 + 3 * 64 * 192) + 1000 * 64
    attention = 2 * 4 * 64 * (128 + 1) / 2  # a query sees (T + 1) / 2 keys on average
    assert model.cost(128).flops == 2 * weights + attention
