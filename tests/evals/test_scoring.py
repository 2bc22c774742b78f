"""Scores: as the model gives them token by token, at any batch size, and as transformers does."""

from __future__ import annotations

import random

import pytest
import torch

from rondo.evals.scoring import continuations, token_log_likelihoods
from rondo.models import MIXERS, Decoder, ModelConfig

pytestmark = pytest.mark.quick


def model(mixer: str) -> Decoder:
    """With a cap that the logits, about 0.2, feel."""
    config = ModelConfig(vocab_size=40, dim=64, num_layers=2, pattern=[mixer], logit_cap=0.2)
    return Decoder(config, seed=1).eval()


def pairs() -> list[tuple[list[int], list[int]]]:
    draw = random.Random(0)
    contexts = [draw.choices(range(40), k=draw.choice([1, 3, 9, 9, 17])) for _ in range(9)]
    return [(c, draw.choices(range(40), k=draw.randint(1, 5))) for c in contexts for _ in range(3)]


@torch.no_grad()
def direct(decoder: Decoder, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """One forward pass from the start for every token."""
    total, greedy, seen = 0.0, True, list(context)
    for token in continuation:
        hidden = decoder(torch.tensor([seen])).hidden[0, -1]
        logits = 0.2 * torch.tanh(hidden @ decoder.output_weight.T / 0.2)
        total += float(logits.log_softmax(-1)[token])
        greedy = greedy and int(logits.argmax()) == token
        seen.append(token)
    return total, greedy


@pytest.mark.parametrize("mixer", ["attention", "gated_deltanet", "mamba2"])
def test_scores_are_the_models_at_any_batch_size(mixer: str) -> None:
    assert mixer in MIXERS
    decoder, asked = model(mixer), pairs()
    with torch.no_grad():  # one continuation that greedy decoding writes
        best = decoder.logits(decoder(torch.tensor([asked[0][0]])).hidden[0, -1]).argmax()
    asked.append((asked[0][0], [int(best)]))
    want = [direct(decoder, *pair) for pair in asked]
    assert want[-1][1]
    for batch_size in (1, 7, 32):
        found = continuations(decoder, asked, batch_size)
        assert [s.greedy for s in found] == [greedy for _, greedy in want]
        for score, (total, _) in zip(found, want, strict=True):
            assert score.log_likelihood == pytest.approx(total, abs=2e-5)


@pytest.mark.parametrize("mixer", ["attention", "gated_deltanet"])
def test_long_texts_are_read_in_pieces_with_all_before_in_sight(mixer: str) -> None:
    decoder, ids = model(mixer), random.Random(2).choices(range(40), k=50)
    with torch.no_grad():
        want = -decoder.loss(torch.tensor([ids[:-1]]), torch.tensor([ids[1:]]), reduction="none")
    for chunk in (7, 49, 1024):
        torch.testing.assert_close(
            token_log_likelihoods(decoder, ids, chunk), want.flatten().detach(), atol=2e-5, rtol=0
        )
    assert token_log_likelihoods(decoder, [3]).shape == (0,)


def test_nothing_to_score_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one token"):
        continuations(model("attention"), [([], [1])])
