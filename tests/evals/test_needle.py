"""Needles: samples are what they say, and a model that knows the answer gets full marks."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from rondo.errors import UserError
from rondo.evals import ruler
from rondo.evals.needle import (
    KINDS,
    NOISE,
    NeedleConfig,
    accuracy,
    main,
    samples,
    split_of,
    write,
)
from rondo.pretrain.data.tokenizer import ByteTokenizer

pytestmark = pytest.mark.quick
TEXT = "Real text has words of many lengths, and it goes on for quite a while without a key. " * 3


def draw(kind: str, length: int = 300, count: int = 20, seed: int = 1) -> list[Any]:
    return list(samples(kind, length, count, seed=seed, text=lambda: TEXT))


@pytest.mark.parametrize("kind", ["number", "word"])
@pytest.mark.parametrize("length", [160, 300, 2048])
def test_a_sample_fills_its_length_and_holds_its_answer_once_before_the_question(
    kind: str, length: int
) -> None:
    found = draw(kind, length)
    for sample in found:
        size = len((sample.prompt + sample.answer).encode())
        assert length - 20 < size <= length
        value = sample.answer.strip(" .")
        assert len(value) == KINDS[kind].size
        assert sample.prompt.count(value) == 1
        assert sample.prompt.endswith(KINDS[kind].question)
    assert len({s.answer for s in found}) == len(found)
    depths = [s.depth for s in found]
    assert min(depths) < 0.3 and max(depths) > 0.7


@pytest.mark.parametrize("length", [400, 1000, 5000])
@pytest.mark.parametrize("width", [1, 3])
def test_passkeys_have_the_shape_of_the_paper(length: int, width: int) -> None:
    def tokens(text: str) -> int:  # three bytes a token, but a digit is one
        return math.ceil(len(re.sub(r"\d", "", text)) / width) + len(re.findall(r"\d", text))

    question = KINDS["passkey"].question
    found = list(samples("passkey", length, 40, seed=1, text=lambda: "", tokens=tokens))
    key = re.compile(r"The pass key is (\d{5})\. Remember it\. \1 is the pass key\. ")
    for number, sample in enumerate(found):
        value, prompt = sample.answer.strip(), sample.prompt
        assert sample.answer == f" {value}" and prompt.endswith(question)
        block = key.search(prompt)
        assert block and block[1] == value and prompt.count(value) == 2
        head = min(prompt.index(NOISE), block.start())
        hay = key.sub("#", prompt[head : -len(question)]).replace(NOISE, ".")
        assert {*hay} <= {"#", "."} and hay.count("#") == 1
        assert sample.depth == (number + 0.5) / 40
        assert hay.index("#") == int(sample.depth * (len(hay) - 1))
        size, one = tokens(prompt + sample.answer), tokens(NOISE)
        # No room for a block more; the one with the key may be shorter than the others.
        assert size <= length < size + one + (one - tokens(block[0])) + 2
    assert len({s.answer for s in found}) == 40
    if length > 1000:
        places = {s.prompt.index("The pass key is") for s in found}
        assert len(places) > 8


def test_a_long_key_takes_the_room_of_blocks() -> None:
    def tokens(text: str) -> int:
        return len(text) + 40 * text.count("Remember")

    for sample in samples("passkey", 1000, 5, seed=1, text=lambda: "", tokens=tokens):
        assert tokens(sample.prompt + sample.answer) <= 1000


def test_samples_are_a_function_of_the_seed() -> None:
    assert draw("number") == draw("number")
    assert draw("number") != draw("number", seed=2)


@pytest.mark.parametrize("kind", [*KINDS, *ruler.KINDS])
def test_values_to_train_on_are_never_scored(kind: str, tmp_path: Path) -> None:
    source = tmp_path / "text.txt"
    source.write_text(TEXT)
    path = write(
        NeedleConfig(kinds=kind, lengths="900", write=str(tmp_path / "a.jsonl"), text=str(source))
    )
    given = [json.loads(line)["text"] for line in path.read_text().splitlines()]
    assert len(given) == 100
    draws = ruler.samples if kind in ruler.KINDS else samples
    for sample in draws(kind, 900, 100, seed=0, text=lambda: TEXT):
        value = sample.answer.strip(" .")
        assert split_of(value) == "test"
        assert not any(value in text for text in given)


class Oracle:
    """A model that repeats what stands after the first 'is ', as the needle does."""

    def __init__(self, wrong_row: int | None = None) -> None:
        self.wrong_row = wrong_row

    def __call__(self, ids: torch.Tensor, *, return_state: bool) -> Any:
        hidden = torch.zeros(*ids.shape, 257)
        for row, tokens in enumerate(ids.tolist()):
            following = [*tokens[1:], 0]
            if row == self.wrong_row:
                following[-3:] = [0] * 3
            hidden[row, torch.arange(len(tokens)), following] = 1.0
        return type("Output", (), {"hidden": hidden})

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden


def test_accuracy_counts_whole_answers() -> None:
    found = draw("passkey", count=10)
    model: Any = Oracle()
    assert accuracy(model, ByteTokenizer(), found, 5) == 1.0
    longest = max(range(5), key=lambda i: len(found[i].prompt))
    model = Oracle(wrong_row=longest)
    assert accuracy(model, ByteTokenizer(), found[:5], 5) == 0.8


def test_texts_to_train_on(tmp_path: Path) -> None:
    found = []
    for marks in (False, True):
        config = NeedleConfig(
            write=str(tmp_path / "needles.jsonl"),
            lengths="300,400",
            kinds="passkey",
            samples=3,
            marks=marks,
        )
        path = write(config)
        found.append([json.loads(line)["text"] for line in path.read_text().splitlines()])
    rows, marked = found
    assert len(rows) == 6 and all("pass key is" in row for row in rows)
    for row, with_marks in zip(rows, marked, strict=True):
        before, _, after = with_marks.partition("<<")
        assert after[:-2].strip().isdecimal() and before + after[:-2] == row


def test_refusals() -> None:
    with pytest.raises(UserError, match=r"unknown needle 'pass' .known: passkey, number, word"):
        draw("pass")
    for kind in ("passkey", "word"):
        with pytest.raises(UserError, match="lengths: 60 tokens leave no room"):
            draw(kind, 60)
    with pytest.raises(UserError, match="a checkpoint to score is needed"):
        main([])
    with pytest.raises(UserError, match="samples: must be at least 1, got 0"):
        main(["runs/x", "--samples", "0"])
    with pytest.raises(UserError, match="write: nothing is scored with it"):
        main(["runs/x", "--write", "f.jsonl"])
