"""Needles that small models are trained to find: the texts, the models, and the table."""

from __future__ import annotations

import pytest
import torch

from rondo.errors import UserError
from rondo.evals import needle_training
from rondo.evals.labelling import Rows
from rondo.evals.needle_training import (
    ANSWER,
    ASK,
    MODELS,
    NEEDLES,
    PASSKEY,
    PLACES,
    QUESTION,
    VALUES,
    WORDS,
    found,
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
    for row, expected in zip(words[:, :-PLACES].tolist(), answers.tolist(), strict=True):
        held: dict[int, int] = {}
        for word, answer in zip(row, expected, strict=False):
            if word < QUESTION:
                held[word // VALUES] = word % VALUES
            asked = QUESTION <= word < PASSKEY
            assert answer == (ANSWER + held[word - QUESTION] if asked else -100)
        assert len(held) == NEEDLES
        if not ask:
            assert {word - QUESTION for word in row[-NEEDLES:]} == set(held)


@pytest.mark.parametrize("ask", [0, 0.25])
def test_a_passkey_is_stated_once_and_asked_for_at_the_end(ask: float) -> None:
    words, answers = texts(50, 24, ask, 0)
    for row, expected in zip(words.tolist(), answers.tolist(), strict=True):
        at = next(i for i, word in enumerate(row) if PASSKEY <= word < ASK)
        passkey = row[at : at + PLACES]
        assert [(word - PASSKEY) // VALUES for word in passkey] == list(range(PLACES))
        assert row[-PLACES:] == [ASK, *passkey[:-1]] and expected[-PLACES:] == passkey
        assert sum(PASSKEY <= word <= ASK for word in row[:-PLACES]) == PLACES


def test_a_passkey_is_right_in_all_words_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    right = torch.tensor([[0, 1, 1, 0, 0, 1, 1, 1], [0, 1, 1, 1, 1, 1, 0, 1]], dtype=torch.bool)
    monkeypatch.setattr(needle_training, "hits", lambda *_: right)
    assert found(Decoder(model("window")), Rows(right, right)) == (6 / 8, 1 / 2)


def test_depths_are_uniform() -> None:
    size = 20
    words, _ = texts(4000, size + NEEDLES + PLACES, 0, 3)
    share = (words < QUESTION).double().mean(0)
    assert (share[size:] == 0).all()
    # The passkey begins at one of 18 places, and every slot beside it has one of the 4 in 17 with
    # a deviation of sqrt(0.2 * 0.8 / 4000) = 0.0063; fewer passkeys cover the ends.
    covered = torch.tensor([min(i + 1, PLACES, size - i) for i in range(size)])
    starts = size - PLACES + 1
    wanted = (1 - covered / starts) * NEEDLES / (starts - 1)
    assert (share[:size] - wanted).abs().max() < 0.03


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
    assert lines[0] == "| model | parameters | asked for | 16 | 32 |"
    cells = [line.strip("| ").split(" | ") for line in lines[4:]]
    assert [row[0] for row in cells] == ["window", "window", "lmm", "lmm"]
    assert [row[2] for row in cells] == ["needles", "passkey"] * 2
    assert all(0 <= float(x) <= 1 for row in cells for x in row[3:])


def test_what_is_unknown_is_said() -> None:
    with pytest.raises(UserError, match="models: unknown 'deep'"):
        main(["--models", "deep"])
    with pytest.raises(UserError, match="steps: must be at least 1, got 0"):
        main(["--steps", "0"])
