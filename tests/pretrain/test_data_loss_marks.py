"""Loss on marked text only: the same tokens as without marks, and targets where they stood."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

from rondo.pretrain.data import (
    DataError,
    PrepareConfig,
    Sources,
    TokenDataset,
    load_tokenizer,
    prepare,
    shards,
)
from rondo.pretrain.data.loss_marks import split_marked
from rondo.pretrain.data.token_files import TokenFile

pytestmark = pytest.mark.quick
MARKS = "<< >>"


def prepared(folder: Path, name: str, texts: list[str], marks: str = MARKS, workers: int = 0):
    source = folder / f"{name}.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    options = {"loss_marks": marks, "workers": workers, "validation_fraction": 0.1}
    return prepare(PrepareConfig(str(source), str(folder / name), **options), quiet=True)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Answers in capitals and digits, marked; and the same text without marks."""
    root, draw = tmp_path_factory.mktemp("marks"), random.Random(0)
    texts = []
    for _ in range(200):
        rows = (
            f"{'x' * draw.randint(1, 9)} é?<<{draw.randrange(10**6):X}>>"
            for _ in range(draw.randint(1, 3))
        )
        texts.append("".join(rows) + ("" if draw.random() < 0.5 else "."))
    plain = [text.replace("<<", "").replace(">>", "") for text in texts]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "GROUP_BYTES", 700)  # several shards
        marked = prepared(root, "marked", texts)
    return marked, prepared(root, "plain", plain, marks="")


def dataset(folder: Path, length: int = 32, split: str = "train") -> TokenDataset:
    sources = Sources([folder], [1.0], load_tokenizer("bytes"))
    return TokenDataset(sources, length, 3, split)  # type: ignore[arg-type]


@pytest.mark.parametrize("split", ["train", "validation"])
def test_targets_are_the_marked_tokens_and_the_end_after_them(
    folders: tuple[Path, Path], split: str
) -> None:
    """Over a few epochs, whatever document a sample begins in."""
    marked = dataset(folders[0], split=split)
    answers = {*b"0123456789ABCDEF"}
    for index in range(150):
        sample = marked.sample(index)
        before = [int(token) for token in sample.tokens]
        for last, token, target in zip(before, before[1:], sample.targets, strict=False):
            learnt = token in answers or (token == 256 and last in answers)
            assert target == (token if learnt and last != 256 else -100)


def documents(folder: Path) -> list[bytes]:
    files = [TokenFile(folder / split) for split in ("train", "validation")]
    return sorted(file[i].tobytes() for file in files for i in range(len(file)))


def test_tokens_are_those_of_the_text_without_marks(folders: tuple[Path, Path]) -> None:
    assert documents(folders[0]) == documents(folders[1])
    cards = [json.loads((folder / "card.json").read_text()) for folder in folders]
    sizes = [sum(split["bytes"] for split in card["splits"].values()) for card in cards]
    assert sizes[0] == sizes[1]


def test_the_mask_counts_as_data_and_is_checked(tmp_path: Path) -> None:
    texts = [f"{i} ?<< {i}>>" for i in range(20)]
    folder = prepared(tmp_path, "a", texts)
    before = dataset(folder).fingerprint()
    mask = folder / "train.loss.bin"
    flags = np.fromfile(mask, np.uint8)
    assert set(flags) == {0, 1} and len(flags) == dataset(folder).unique_tokens()[0]
    (1 - flags).tofile(mask)
    with pytest.raises(DataError, match="damaged"):
        dataset(folder)
    flags[:-1].tofile(mask)
    with pytest.raises(DataError, match="expected one a token"):
        dataset(folder)
    moved = prepared(tmp_path, "b", [text.replace("?<<", "<<?") for text in texts])
    assert dataset(moved).fingerprint() != before


@pytest.mark.parametrize("text", ["none", "a >> b <<", "<< a << b >>", "<< a", "<<a>> b >>"])
def test_marks_that_do_not_fit_are_errors(tmp_path: Path, text: str) -> None:
    with pytest.raises(DataError, match="open and close them in turn"):
        prepared(tmp_path, "x", ["fine << yes >>", text])


def test_marks_are_two_words(tmp_path: Path) -> None:
    for marks in ("<<", "<< <<", "a b c"):
        with pytest.raises(DataError, match="expected two different words"):
            prepared(tmp_path, "x", ["a"], marks=marks)


def test_parts_at_the_borders() -> None:
    assert split_marked("<<a>>b<<c>>", ("<<", ">>")) == [("a", True), ("b", False), ("c", True)]
    assert split_marked("a<<>>", ("<<", ">>")) == [("a", False)]
