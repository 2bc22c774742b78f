"""Text of which only some parts are to be learnt: an answer, say, but not its question."""

from __future__ import annotations

import re

from rondo.pretrain.data.errors import DataError
from rondo.pretrain.data.tokenizer import Tokenizer


def parse_marks(marks: str) -> tuple[str, str] | None:
    """The opening and the closing mark of `"<< >>"`; None for an empty string.

    Raises:
        DataError: these are not two different words.
    """
    if not marks:
        return None
    words = marks.split()
    if len(words) != 2 or words[0] == words[1]:
        raise DataError(f"loss_marks is {marks!r}; expected two different words, as in '<< >>'")
    return words[0], words[1]


def split_marked(text: str, marks: tuple[str, str]) -> list[tuple[str, bool]]:
    """The parts of `text` without the marks, and whether each stood between two.

    Raises:
        DataError: marks do not open and close in turn, or there are none.
    """
    opening, closing = marks
    pieces = re.split(f"({re.escape(opening)}|{re.escape(closing)})", text)
    if len(pieces) == 1 or pieces[1::2] != [opening, closing] * (len(pieces) // 4):
        raise DataError(
            f"a document with loss_marks '{opening} {closing}' has to open and close them in "
            f"turn, once at least; found {text[:60]!r}"
        )
    return [(part, i % 2 == 1) for i, part in enumerate(pieces[::2]) if part]


def encode_marked(
    text: str, marks: tuple[str, str], tokenizer: Tokenizer
) -> tuple[list[int], list[bool]]:
    """Ids of a document with its end, and which of them the loss is on.

    Each part is encoded by itself. The end of the document counts if a marked part comes before it.
    """
    ids: list[int] = []
    scored: list[bool] = []
    for part, marked in split_marked(text, marks):
        new = tokenizer.encode(part)
        ids += new
        scored += [marked] * len(new)
    return [*ids, tokenizer.eod], [*scored, bool(scored) and scored[-1]]
