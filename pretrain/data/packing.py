"""A source as an endless stream of tokens: epoch after epoch of its documents.

Samples are cut from the stream, so documents run on from one sample into the next, and the last
sample of an epoch into the first documents of the next.
"""

from __future__ import annotations

import functools
import hashlib

import numpy as np

from rondo.pretrain.data.errors import DataError
from rondo.pretrain.data.token_files import TokenFile

BLOCK = 256
"""Documents between two remembered positions of an epoch's order."""


class Stream:
    """Documents of `file`, each once an epoch, shuffled anew each epoch when `seed` is given.

    An epoch's order is a function of (seed, epoch) alone. Two epochs' orders are held at a time:
    4 bytes a document, and 8 for every 256.
    """

    def __init__(self, file: TokenFile, seed: tuple[int, int] | None) -> None:
        """`seed` is (run's seed, source's number); None keeps the file's order."""
        if file.num_tokens == 0:
            raise DataError(f"{file.path}: no tokens in it")
        self.file = file
        self._seed = seed
        self._lengths = np.diff(file.starts)
        self._order = functools.lru_cache(maxsize=2)(self._make_order)

    def check(self, ids: np.ndarray, vocab_size: int) -> None:
        """Raise DataError when one of `ids` is outside the vocabulary."""
        self.file.check(ids, vocab_size)

    def window(self, start: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens `[start, start + length)` of the stream, int64, and their documents' numbers,
        counted from 0 at the window's first document, int32."""
        pieces = self._pieces(start, length)
        parts = [self.file.tokens[begin:end] for begin, end in pieces]
        segments = np.repeat(np.arange(len(parts), dtype=np.int32), [len(p) for p in parts])
        return np.concatenate(parts).astype(np.int64), segments

    def scored(self, start: int, length: int) -> np.ndarray | None:
        """Which tokens of a window the loss is on, bool; None: all of them."""
        mask = self.file.scored
        if mask is None:
            return None
        return np.concatenate([mask[begin:end] for begin, end in self._pieces(start, length)])

    def _pieces(self, start: int, length: int) -> list[tuple[int, int]]:
        """What of the file a window consists of, from and to: a part of each document."""
        pieces: list[tuple[int, int]] = []
        missing = length
        epoch, offset = divmod(start, self.file.num_tokens)
        while missing:
            order, positions = self._order(epoch)
            block = int(np.searchsorted(positions, offset, "right")) - 1
            into = offset - int(positions[block])
            for document in order[block * BLOCK :]:
                skip = min(into, int(self._lengths[document]))
                into -= skip
                begin = int(self.file.starts[document]) + skip
                end = min(begin + missing, int(self.file.starts[document + 1]))
                if end > begin:
                    pieces.append((begin, end))
                    missing -= end - begin
                if not missing:
                    break
            epoch, offset = epoch + 1, 0
        return pieces

    def _make_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(documents in the epoch's order, position of every BLOCK-th of them in the epoch)."""
        count = len(self.file)
        kind = np.uint32 if count < 2**32 else np.int64
        if self._seed is None:
            order = np.arange(count, dtype=kind)
        else:
            # RandomState's streams are frozen; those of numpy's newer generators may change.
            name = repr((*self._seed, epoch)).encode()
            state = np.frombuffer(hashlib.sha256(name).digest(), "<u4")
            order = np.random.RandomState(state).permutation(count).astype(kind)
        ends = np.cumsum(self._lengths[order])
        return order, np.concatenate([[0], ends[BLOCK - 1 :: BLOCK]])
