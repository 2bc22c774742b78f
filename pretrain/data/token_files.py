"""Reading Megatron `.bin/.idx` token files.

The index is little-endian and unpadded: magic (9 bytes), version 1 (u64), type code (u8), number
of sequences S (u64), number of document indices D + 1 (u64), lengths (S x i32), byte offsets
(S x i64), document indices (D + 1 x i64: the first sequence of each document, and S). The `.bin`
is the ids of all sequences, back to back. The format is that of
`megatron.core.datasets.indexed_dataset`, which writes these files; importing it takes seconds,
so reading does without.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

from rondo.pretrain.data.card import CARD, read_card
from rondo.pretrain.data.errors import DataError
from rondo.pretrain.data.folders import sha256_file

MAGIC = b"MMIDIDX\x00\x00"
OLD_MAGIC = b"TNTIDX"
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
FLOAT_CODES = (6, 7)
CHECKED_BYTES = 64 * 2**20
"""Files up to this size are checked against the card's sha256 whenever they are opened."""
SCAN_TOKENS = 2**22
COUNTED_TOKENS = 2**26


class TokenFile:
    """The documents of one `prefix.bin` / `prefix.idx`, memory-mapped; with `prefix.loss.bin`, a
    byte a token, the loss is on the tokens where it is not 0 only.

    Raises DataError when either file is missing, truncated, too long, or not such a file.
    """

    def __init__(self, prefix: Path) -> None:
        self.path = prefix.with_name(prefix.name + ".bin")
        index = prefix.with_name(prefix.name + ".idx")
        raw = _map(index)
        self.dtype, sequences, documents = _header(index, raw)
        at = HEADER.size  # 34: the arrays are unaligned, so they are viewed through bytes
        lengths = np.frombuffer(raw, "<i4", sequences, at)
        pointers = np.frombuffer(raw, "<i8", sequences, at + 4 * sequences)
        borders = np.frombuffer(raw, "<i8", documents, at + 12 * sequences)
        ends = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        if (lengths < 0).any() or (pointers != ends[:-1] * self.dtype.itemsize).any():
            raise DataError(f"{index}: damaged: its offsets do not follow from its lengths")
        if borders[0] != 0 or borders[-1] != sequences or (np.diff(borders) < 0).any():
            raise DataError(f"{index}: damaged: document indices do not rise from 0 to {sequences}")
        self.starts: np.ndarray = ends[borders]
        """Position of each document's first token, and the end; int64 `(documents + 1,)`."""
        self.num_tokens = int(ends[-1])
        expected = self.num_tokens * self.dtype.itemsize
        data = _map(self.path)
        if len(data) != expected:
            raise DataError(
                f"{self.path}: {len(data)} bytes, expected {expected} "
                f"({self.num_tokens} tokens of {self.dtype.itemsize} bytes, by {index.name})"
            )
        self.tokens: np.ndarray = data.view(self.dtype)
        """All ids `(num_tokens,)`, in the file's integer type."""
        self.scored: np.ndarray | None = None
        """Whether the loss is on each token, bool `(num_tokens,)`; None: it is on all."""
        mask = prefix.with_name(prefix.name + ".loss.bin")
        if mask.is_file():
            self.scored = _map(mask).view(bool)
            if len(self.scored) != self.num_tokens:
                raise DataError(
                    f"{mask}: {len(self.scored)} bytes, expected one a token, {self.num_tokens}"
                )

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, document: int) -> np.ndarray:
        """Ids of one document."""
        return self.tokens[self.starts[document] : self.starts[document + 1]]

    def counts(self, size: int) -> np.ndarray:
        """How often each id below `size` occurs in the first `COUNTED_TOKENS` tokens, int64
        `(size,)`: enough to estimate frequencies. Raises DataError for other ids."""
        total = np.zeros(size, np.int64)
        counted = min(self.num_tokens, COUNTED_TOKENS)
        for start in range(0, counted, SCAN_TOKENS):
            ids = self.tokens[start : min(start + SCAN_TOKENS, counted)].astype(np.int64)
            self.check(ids, size)
            total += np.bincount(ids, minlength=size)
        return total

    def check(self, ids: np.ndarray, vocab_size: int) -> None:
        """Raise DataError when one of `ids` is outside the vocabulary."""
        if len(ids) and (ids.min() < 0 or ids.max() >= vocab_size):
            wrong = ids[(ids < 0) | (ids >= vocab_size)][0]
            raise DataError(
                f"{self.path}: token id {wrong} is outside the vocabulary of {vocab_size} "
                "(of the tokenizer, or model.vocab_size where that is less)"
            )


def _map(path: Path) -> np.ndarray:
    try:
        if path.stat().st_size == 0:  # which cannot be mapped
            return np.zeros(0, np.uint8)
        return np.memmap(path, np.uint8, "r")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None


def _header(path: Path, raw: np.ndarray) -> tuple[np.dtype, int, int]:
    """(type of the ids, sequences, document indices) of an index, whose size is checked."""
    if raw[: len(OLD_MAGIC)].tobytes() == OLD_MAGIC:
        raise DataError(f"{path}: an index of the old TNTIDX format; prepare its source anew")
    if len(raw) < HEADER.size:
        raise DataError(f"{path}: {len(raw)} bytes, expected at least {HEADER.size}")
    magic, version, code, sequences, documents = HEADER.unpack(raw[: HEADER.size].tobytes())
    if magic != MAGIC:
        raise DataError(f"{path}: starts with {magic!r}, expected {MAGIC!r}: not a token index")
    if version != 1:
        raise DataError(f"{path}: version {version}, expected 1")
    if code not in DTYPES:
        what = "floating point" if code in FLOAT_CODES else "unknown"
        raise DataError(f"{path}: type code {code} is {what}; expected one of {sorted(DTYPES)}")
    expected = HEADER.size + 12 * sequences + 8 * documents
    if len(raw) != expected or documents < 1:
        raise DataError(
            f"{path}: {len(raw)} bytes, expected {expected} "
            f"({sequences} sequences, {documents} document indices)"
        )
    return np.dtype(DTYPES[code]).newbyteorder("<"), sequences, documents


def open_split(folder: Path, split: str, vocab_size: int) -> TokenFile:
    """One split of a prepared folder, checked as far as is cheap.

    Sizes always; checksums of files up to 64 MiB; the largest id by the card, or by a scan in a
    folder that has none (token files of another origin).

    Raises DataError for a folder that lacks the split, for damage, and for ids that `vocab_size`
    does not cover.
    """
    if not (folder / f"{split}.idx").is_file():
        raise DataError(f"{folder}: no {split}.idx in it; expected a prepared folder")
    file = TokenFile(folder / split)
    if not (folder / CARD).is_file():
        file.counts(vocab_size)
        return file
    card = read_card(folder)
    try:
        largest = card["splits"][split]["max_token"]
        suffixes = (".bin", ".idx", ".loss.bin") if file.scored is not None else (".bin", ".idx")
        recorded = {suffix: card["files"][split + suffix] for suffix in suffixes}
        for suffix, record in recorded.items():
            _verify(folder / (split + suffix), record["bytes"], record["sha256"])
    except (KeyError, TypeError) as error:
        raise DataError(f"{folder / CARD}: incomplete: {error}") from None
    if largest >= vocab_size:
        raise DataError(
            f"{file.path}: token id {largest} is outside the vocabulary of {vocab_size} "
            "(of the tokenizer, or model.vocab_size where that is less)"
        )
    return file


def _verify(path: Path, size: int, sha256: str) -> None:
    actual = path.stat().st_size
    if actual != size:
        raise DataError(f"{path}: {actual} bytes, expected {size} by {CARD}")
    if actual <= CHECKED_BYTES and sha256_file(path) != sha256:
        raise DataError(f"{path}: damaged: its sha256 is not the one in {CARD}")
