"""Text to token ids and back: bytes, sentencepiece, or a Hugging Face tokenizer.json."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from rondo.pretrain.data.errors import DataError

MAX_FILE_BYTES = 256 * 2**20
"""Larger tokenizer files are refused before they are read."""

END_OF_DOCUMENT = "<|endoftext|>"
END_NAMES = (END_OF_DOCUMENT, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "<eod>", "[EOS]")
SPACE = "\u2581"
"""The character that stands for a space inside pieces."""


class Tokenizer(Protocol):
    """What the data layer needs of a tokenizer."""

    kind: str
    vocab_size: int
    eod: int
    """Id that ends a document."""
    file_name: str
    content: bytes
    """Name and bytes of the one file that a tokenizer is, for `load_tokenizer`."""

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, no end-of-document added; special tokens' names are ordinary text."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; end-of-document ids stand for nothing."""
        ...

    def byte_lengths(self) -> np.ndarray:
        """Bytes of UTF-8 text that each id stands for, int64 `(vocab_size,)`; 0 for `eod`."""
        ...

    def save(self, folder: Path) -> None:
        """Write the tokenizer's file into `folder`; `load_tokenizer(folder)` reads it."""
        ...

    def fingerprint(self) -> str:
        """Hash of everything that encoding depends on."""
        ...


class ByteTokenizer:
    """UTF-8 bytes, and id 256 for the end of a document."""

    kind = "bytes"
    file_name = "tokenizer.bytes"
    vocab_size = 257
    eod = 256
    content = b"UTF-8 bytes; 256 ends a document\n"

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8", "replace"))

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(i for i in ids if i < 256).decode("utf-8", "replace")

    def byte_lengths(self) -> np.ndarray:
        lengths = np.ones(self.vocab_size, np.int64)
        lengths[self.eod] = 0
        return lengths

    def save(self, folder: Path) -> None:
        (folder / self.file_name).write_bytes(self.content)

    def fingerprint(self) -> str:
        return hashlib.sha256(b"bytes:257").hexdigest()


class SentencePieceTokenizer:
    """A sentencepiece model; its end-of-sentence piece ends a document."""

    kind = "sentencepiece"
    file_name = "tokenizer.model"

    def __init__(self, model: bytes, origin: str) -> None:
        from sentencepiece import SentencePieceProcessor

        try:
            self._pieces = SentencePieceProcessor(model_proto=model)
        except RuntimeError:
            raise DataError(f"{origin}: not a sentencepiece model") from None
        self.content = model
        self.vocab_size: int = self._pieces.vocab_size()
        self.eod: int = self._pieces.eos_id()
        if self.eod < 0:
            raise DataError(f"{origin}: the model has no end-of-sentence piece to end documents")
        fallback = [self._pieces.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]
        # The library writes spaces as U+2581, so a real U+2581 has to go as bytes.
        self._space = None if self._pieces.unk_id() in fallback else fallback

    def encode(self, text: str) -> list[int]:
        text = text.encode("utf-8", "replace").decode()
        if self._space is None or SPACE not in text:
            return self._pieces.encode(text)
        first, *rest = text.split(SPACE)
        ids = self._pieces.encode(first)
        for part in rest:
            ids += self._space + self._pieces.encode(part)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        return self._pieces.decode([int(i) for i in ids if i != self.eod])

    def byte_lengths(self) -> np.ndarray:
        pieces = self._pieces
        lengths = np.zeros(self.vocab_size, np.int64)
        for i in range(self.vocab_size):
            if pieces.is_byte(i):
                lengths[i] = 1
            elif not (pieces.is_control(i) or pieces.is_unknown(i)):
                lengths[i] = len(pieces.id_to_piece(i).replace(SPACE, " ").encode())
        return lengths

    def save(self, folder: Path) -> None:
        (folder / self.file_name).write_bytes(self.content)

    def fingerprint(self) -> str:
        return hashlib.sha256(b"sentencepiece:" + self.content).hexdigest()


class HuggingFaceTokenizer:
    """A `tokenizer.json` of Hugging Face `tokenizers`."""

    kind = "huggingface"
    file_name = "tokenizer.json"

    def __init__(self, content: bytes, origin: str) -> None:
        from tokenizers import Tokenizer as Fast

        try:
            self._fast = Fast.from_str(content.decode("utf-8"))
        except Exception as error:
            raise DataError(f"{origin}: not a Hugging Face tokenizer.json: {error}") from None
        self.content = content
        self._fast.no_truncation()
        self._fast.no_padding()
        self._fast.encode_special_tokens = True  # a document cannot smuggle in its own end
        vocabulary = self._fast.get_vocab(with_added_tokens=True)
        self.vocab_size: int = max(vocabulary.values(), default=-1) + 1
        ends = [vocabulary[name] for name in END_NAMES if name in vocabulary]
        if not ends:
            raise DataError(
                f"{origin}: no token to end documents; expected one of {', '.join(END_NAMES)}"
            )
        self.eod: int = ends[0]

    def encode(self, text: str) -> list[int]:
        clean = text.encode("utf-8", "replace").decode()
        return self._fast.encode(clean, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        return self._fast.decode([int(i) for i in ids if i != self.eod], skip_special_tokens=False)

    def piece(self, token: int) -> str:
        """The name of a token."""
        return self._fast.id_to_token(token) or ""

    def byte_lengths(self) -> np.ndarray:
        description = json.loads(self._fast.to_str())
        parts = json.dumps([description.get("decoder"), description.get("pre_tokenizer")])
        one_character_a_byte = '"ByteLevel"' in parts
        lengths = np.zeros(self.vocab_size, np.int64)
        for piece, i in self._fast.get_vocab(with_added_tokens=True).items():
            if one_character_a_byte:
                lengths[i] = len(piece)
            elif len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
                lengths[i] = 1
            else:
                lengths[i] = len(piece.removeprefix("##").replace(SPACE, " ").encode())
        for i, token in self._fast.get_added_tokens_decoder().items():
            lengths[i] = 0 if token.special else len(token.content.encode())
        lengths[self.eod] = 0
        return lengths

    def save(self, folder: Path) -> None:
        (folder / self.file_name).write_bytes(self.content)

    def fingerprint(self) -> str:
        return hashlib.sha256(b"huggingface:" + self.content).hexdigest()


FILE_NAMES: Sequence[str] = tuple(
    kind.file_name for kind in (ByteTokenizer, SentencePieceTokenizer, HuggingFaceTokenizer)
)


def load_tokenizer(spec: str | Path) -> Tokenizer:
    """The tokenizer `spec` names: "bytes", a .model or tokenizer.json file, or a saved folder.

    Raises DataError for anything else, for files that are missing, empty, damaged or over
    256 MiB, and for tokenizers without a token that can end a document.
    """
    if spec == "bytes":
        return ByteTokenizer()
    path = Path(spec).expanduser()
    if path.is_dir():
        found = [path / name for name in FILE_NAMES if (path / name).is_file()]
        if not found:
            raise DataError(f"{path}: no tokenizer in this folder ({', '.join(FILE_NAMES)})")
        path = found[0]
    if path.name == ByteTokenizer.file_name and path.is_file():
        return ByteTokenizer()
    if path.suffix not in (".model", ".json"):
        near = difflib.get_close_matches(str(spec), ["bytes", "sentencepiece:N"], n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise DataError(
            f"unknown tokenizer {str(spec)!r}: expected 'bytes', 'sentencepiece:N', or the path of "
            f"a sentencepiece .model or a Hugging Face tokenizer.json{hint}"
        )
    content = _read_bounded(path)
    if path.suffix == ".model":
        return SentencePieceTokenizer(content, str(path))
    return HuggingFaceTokenizer(content, str(path))


def _read_bounded(path: Path) -> bytes:
    if not path.is_file():
        raise DataError(f"{path}: no such tokenizer file")
    size = path.stat().st_size
    if not 0 < size <= MAX_FILE_BYTES:
        raise DataError(
            f"{path}: {size} bytes cannot be a tokenizer; expected 1 to {MAX_FILE_BYTES}"
        )
    return path.read_bytes()
