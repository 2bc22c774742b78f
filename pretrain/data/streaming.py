"""A source that is tokenised while it is trained on, from the hub or from local files.

Rows are read in the order of the dataset, in blocks of `shuffle_buffer`. Each block is shuffled by
a function of (seed, source, epoch, block), tokenised and cut into samples, so that a sample is a
pure function of its index here too, whatever the number of ranks. To go on, no buffer has to be
kept: where the block of a sample begins in the dataset (`datasets`' state), and at which token, is
all; the block is read once more.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from rondo.pretrain.data.errors import DataError
from rondo.pretrain.data.row_sources import RowSource, row_text
from rondo.pretrain.data.shards import held_out, to_utf8
from rondo.pretrain.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Place:
    """Where a block begins."""

    token: int
    """Its first token's position in the stream."""
    epoch: int
    block: int
    """Its number in the epoch."""
    empty: bool
    """Whether no token of this epoch comes before it."""
    rows: dict[str, Any] | None
    """State of the dataset before its first row; None: the dataset begins."""


START = Place(0, 0, 0, True, None)


@dataclass(frozen=True)
class _Block:
    place: Place
    tokens: np.ndarray
    """int64."""
    ends: np.ndarray
    """Position behind each document in `tokens`, int64."""

    @property
    def end(self) -> int:
        return self.place.token + len(self.tokens)


class StreamedSource:
    """An endless stream of tokens as `packing.Stream`, epoch after epoch.

    Windows are best asked for in rising order: one that lies before those in memory is read again
    from the nearest place that is known, at worst from the beginning.

    Args:
        rows: the dataset.
        tokenizer: of the run.
        seed: (run's seed, source's number).
        shuffle_buffer: rows in a block.
        fraction: share of documents that are held out, by their hash.
        history: tokens before the last window whose places are remembered.
    """

    def __init__(
        self,
        rows: RowSource,
        tokenizer: Tokenizer,
        seed: tuple[int, int],
        shuffle_buffer: int,
        fraction: float,
        history: int,
    ) -> None:
        self.rows, self.tokenizer = rows, tokenizer
        self.identity = ["streamed", rows.identity, shuffle_buffer, fraction]
        """What the tokens depend on besides tokenizer and seed (JSON)."""
        self._seed, self._size, self._fraction = seed, shuffle_buffer, fraction
        self._history = history
        self._places = [START]
        self._go_to(START)

    def window(self, start: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """As `packing.Stream.window`. Raises DataError where the dataset cannot be read."""
        if start < (self._blocks[0].place if self._blocks else self._next).token:
            self._go_to(self._place_of(start))
        while self._next.token < start + length:
            self._blocks.append(self._read_block())
            while self._blocks[0].end <= start:
                self._blocks.popleft()
                if not self._blocks:
                    break
        self._forget(start)
        return self._cut(start, length)

    def scored(self, start: int, length: int) -> None:
        """The loss is on all tokens."""

    def check(self, ids: np.ndarray, vocab_size: int) -> None:
        """Raise DataError when one of `ids` is outside the vocabulary."""
        if ids.max() >= vocab_size:
            raise DataError(
                f"{self.rows.name}: token id {ids.max()} is outside the vocabulary of {vocab_size} "
                "(of the tokenizer, or model.vocab_size where that is less)"
            )

    def state(self, start: int) -> dict[str, Any]:
        """Where to go on from for windows at `start` and later, and in what (`source`, which
        `open_rows` takes), as JSON."""
        return {"source": self.rows.identity, **asdict(self._place_of(start))}

    def resume(self, state: dict[str, Any]) -> None:
        """Goes on from `state`."""
        place = Place(**{key: value for key, value in state.items() if key != "source"})
        self._places = [START] if place == START else [START, place]
        self._go_to(place)

    def _place_of(self, start: int) -> Place:
        """The last known place at or before a token."""
        return next(place for place in reversed([*self._places]) if place.token <= start)

    def _forget(self, start: int) -> None:
        """Drops places that lie far back, but for the beginning."""
        while len(self._places) > 2 and self._places[2].token <= start - self._history:
            del self._places[1]

    def _go_to(self, place: Place) -> None:
        self._blocks: deque[_Block] = deque()
        self._next = place
        self._open(place.rows)

    def _open(self, state: dict[str, Any] | None) -> None:
        self._dataset = self.rows.open()
        if state is not None:
            self._dataset.load_state_dict(copy.deepcopy(state))
        self._texts: Iterator[str] = (row_text(self.rows, row) for row in self._dataset)

    def _read_block(self) -> _Block:
        """The next block; behind the last one of an epoch comes the first of the next."""
        place = self._next
        texts = self._take()
        documents = [text for text in map(to_utf8, texts) if text]
        documents = [text for text in documents if not held_out(text, self._fraction)]
        name = repr((*self._seed, place.epoch, place.block)).encode()
        # RandomState's streams are frozen; those of numpy's newer generators may change.
        words = np.frombuffer(hashlib.sha256(name).digest(), "<u4")
        order = np.random.RandomState(words).permutation(len(documents))
        encode, eod = self.tokenizer.encode, self.tokenizer.eod
        ids = [np.array([*encode(documents[i].decode()), eod], np.int64) for i in order]
        tokens = np.concatenate([np.zeros(0, np.int64), *ids])
        block = _Block(place, tokens, np.cumsum([len(each) for each in ids], dtype=np.int64))
        empty = place.empty and not len(tokens)
        if len(texts) == self._size:
            rows = copy.deepcopy(self._dataset.state_dict())
            self._next = Place(block.end, place.epoch, place.block + 1, empty, rows)
        elif empty:
            raise DataError(f"{self.rows.name}: no document to train on in an epoch of it")
        else:
            self._next = Place(block.end, place.epoch + 1, 0, True, None)
            self._open(None)
        if len(tokens) and self._next.token > self._places[-1].token:
            self._places.append(self._next)
        return block

    def _take(self) -> list[str]:
        try:
            return list(itertools.islice(self._texts, self._size))
        except DataError:
            raise
        except Exception as error:  # of the network, of a damaged file
            name = self.rows.name
            raise DataError(f"{name}: cannot be read: {type(error).__name__}: {error}") from error

    def _cut(self, start: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        tokens = np.concatenate([block.tokens for block in self._blocks])
        ends = np.concatenate([block.ends + block.place.token for block in self._blocks])
        first = start - self._blocks[0].place.token
        number = np.searchsorted(ends, np.arange(start, start + length), "right")
        return tokens[first : first + length], (number - number[0]).astype(np.int32)
