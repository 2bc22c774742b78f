"""Needles that small models are trained to find: the texts, the models, and the table."""

from __future__ import annotations

import pytest

from rondo.errors import UserError
from rondo.evals import needle_training
from rondo.evals.needle_training import (
    ANSWER,
    MODELS,
    NEEDLES,
    QUESTION,
    VALUES,
    WORDS,
    main,
    model,
    texts,
)
from rondo.models import Decoder

pytestmark = pytest.mark.quick


@pytest.mark.parametrize("ask", [0, 0.25])
def test_answers_are_the_values_of_the_keys_asked_for(ask: float) -> None:
    words, answers = texts(50, 24, ask, 0)
    assert words.min() >= 0 and words.max() < WORDS
    assert not ((words >= ANSWER) & (words < ANSWER + VALUES)).any()  # answers are not in the text
    for row, expected in zip(words.tolist(), answers.tolist(), strict=True):
        held: dict[int, int] = {}
        for word, answer in zip(row, expected, strict=True):
            if word < QUESTION:
                held[word // VALUES] = word % VALUES
            asked = QUESTION <= word < ANSWER
            assert answer == (ANSWER + held[word - QUESTION] if asked else -100)
        assert len(held) == NEEDLES
        if not ask:
            assert {word - QUESTION for word in row[-NEEDLES:]} == set(held)


def test_depths_are_uniform() -> None:
    words, _ = texts(4000, 20 + NEEDLES, 0, 3)
    share = (words < QUESTION).double().mean(0)
    assert (share[20:] == 0).all()
    # A position has one of the 4 in 20 with a deviation of sqrt(0.2 * 0.8 / 4000) = 0.0063.
    assert (share[:20] - NEEDLES / 20).abs().max() < 0.03


def test_models_are_of_equal_size() -> None:
    sizes = [sum(p.numel() for p in Decoder(model(name)).parameters()) for name in MODELS]
    assert max(sizes) / min(sizes) < 1.02


def test_a_table_of_short_runs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(needle_training, "TRAINED", (8, 16))
    monkeypatch.setattr(needle_training, "FACTORS", (1, 2))
    monkeypatch.setattr(needle_training, "POOL", 50)
    assert main(["--models", "window,lmm", "--steps", "2", "--samples", "4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| model | parameters | 16 | 32 |"
    assert [line.split(" | ")[0] for line in lines[3:]] == ["| window", "| lmm"]
    assert all(0 <= float(x) <= 1 for line in lines[3:] for x in line.strip("| ").split(" | ")[2:])


def test_what_is_unknown_is_said() -> None:
    with pytest.raises(UserError, match="models: unknown 'deep'"):
        main(["--models", "deep"])
    with pytest.raises(UserError, match="steps: must be at least 1, got 0"):
        main(["--steps", "0"])
