"""Tokenising groups of documents, in this process or in several; each group is one shard file.

A shard's name carries a hash of its text and of the tokenizer, so that a preparation that was
interrupted finds what it has already done, and nothing else.
"""

from __future__ import annotations

import hashlib
import itertools
import multiprocessing
import os
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from rondo.pretrain.data.errors import DataError
from rondo.pretrain.data.loss_marks import encode_marked
from rondo.pretrain.data.tokenizer import Tokenizer, load_tokenizer

GROUP_BYTES = 16 * 2**20
"""Text in a shard; a corpus of one shard never starts another process."""
REPLACEMENT = "\ufffd"


@dataclass(frozen=True)
class Group:
    """Documents (UTF-8) that become the shard `path`."""

    path: Path
    documents: list[bytes]

    @property
    def size(self) -> int:
        return sum(map(len, self.documents))


@dataclass(frozen=True)
class Shard:
    """Documents as token ids, in the corpus's order."""

    tokens: np.ndarray
    """All ids, int32; each document ends with the end-of-document id."""
    lengths: np.ndarray
    """Tokens of each document, int64."""
    text_bytes: np.ndarray
    """UTF-8 bytes of each document, marks not counted, int64."""
    hashes: np.ndarray
    """128-bit hash of each document's text, uint64 `(documents, 2)`."""
    replaced: np.ndarray
    """Characters U+FFFD, which undecodable bytes are read as; int64 scalar."""
    scored: np.ndarray
    """Which of the ids the loss is on, bool; empty: all of them."""

    def write(self, path: Path) -> None:
        beside = path.with_name(f"{path.name}.{os.getpid()}.part")
        with open(beside, "wb") as file:
            np.savez(file, **{f.name: getattr(self, f.name) for f in fields(self)})
        os.replace(beside, path)

    @classmethod
    def read(cls, path: Path) -> Shard:
        with np.load(path, allow_pickle=False) as arrays:
            return cls(**{f.name: arrays[f.name] for f in fields(cls)})

    @staticmethod
    def read_hashes(path: Path) -> np.ndarray:
        with np.load(path, allow_pickle=False) as arrays:
            return arrays["hashes"]

    @staticmethod
    def read_lengths(path: Path) -> np.ndarray:
        with np.load(path, allow_pickle=False) as arrays:
            return arrays["lengths"]


def group_documents(texts: Iterable[str], folder: Path, fingerprint: str) -> Iterator[Group]:
    """Collect documents into groups of GROUP_BYTES bytes of text; empty documents are dropped."""
    held: list[bytes] = []
    size = 0
    numbers = itertools.count()

    def group() -> Group:
        digest = hashlib.blake2b(fingerprint.encode(), digest_size=12)
        for document in held:
            digest.update(len(document).to_bytes(8, "little"))
            digest.update(document)
        return Group(folder / f"{next(numbers):08d}-{digest.hexdigest()}.npz", held)

    for text in texts:
        if not text:
            continue
        held.append(to_utf8(text))
        size += len(held[-1])
        if size >= GROUP_BYTES:
            yield group()
            held, size = [], 0
    if held:
        yield group()


def to_utf8(text: str) -> bytes:
    """UTF-8 of any Python string; lone surrogates become U+FFFD, split pairs are joined."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError:
        joined = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        return joined.encode("utf-8")


def document_hash(document: bytes, seed: int = 0) -> bytes:
    """128 bits of a document's text."""
    key = seed.to_bytes(8, "little", signed=True)
    return hashlib.blake2b(document, digest_size=16, key=key).digest()


def held_out(document: bytes, fraction: float) -> bool:
    """Whether a document is for validation, by its hash, as in a prepared folder."""
    return int.from_bytes(document_hash(document)[:8], "little") < int(fraction * 2**64)


def tokenize(
    documents: list[bytes], tokenizer: Tokenizer, seed: int, marks: tuple[str, str] | None = None
) -> Shard:
    """The documents' ids, each followed by the end-of-document id, and their hashes.

    `seed` keys the hashes, and so the train/validation split; `marks` open and close what the loss
    is on.
    """
    ids, sizes, hashes, replaced = [], [], b"", 0
    scored: list[bool] = []
    for document in documents:
        text = document.decode("utf-8")
        replaced += text.count(REPLACEMENT)
        size = len(document)
        if marks is None:
            found = [*tokenizer.encode(text), tokenizer.eod]
        else:
            found, learnt = encode_marked(text, marks, tokenizer)
            scored += learnt
            size -= sum(text.count(mark) * len(mark.encode()) for mark in marks)
        ids.append(np.array(found, np.int32))
        sizes.append(size)
        hashes += document_hash(document, seed)
    return Shard(
        tokens=np.concatenate(ids),
        lengths=np.array([len(i) for i in ids], np.int64),
        text_bytes=np.array(sizes, np.int64),
        hashes=np.frombuffer(hashes, "<u8").reshape(-1, 2),
        replaced=np.array(replaced, np.int64),
        scored=np.array(scored, bool),
    )


_worker_tokenizer: Tokenizer | None = None


def _start_worker(folder: Path) -> None:
    global _worker_tokenizer
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker_tokenizer = load_tokenizer(folder)


def _end_with_parent() -> None:
    """A killed parent cannot stop its workers, which would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(group: Group, seed: int, marks: tuple[str, str] | None) -> Path:
    if _worker_tokenizer is None:
        raise RuntimeError("the worker was started without its tokenizer")
    tokenize(group.documents, _worker_tokenizer, seed, marks).write(group.path)
    return group.path


def write_shards(
    groups: Iterator[Group],
    tokenizer: Tokenizer,
    folder: Path,
    seed: int,
    workers: int,
    marks: tuple[str, str] | None = None,
) -> Iterator[tuple[Path, int]]:
    """Make every group's shard that is not there yet; yields (path, bytes of text) as they end.

    `folder` holds the saved tokenizer. With 0 workers, or a single group, all is done here;
    otherwise in `workers` spawned processes, at most two groups each in flight.
    """
    first = list(itertools.islice(groups, 2))
    groups = itertools.chain(first, groups)
    if workers == 0 or len(first) < 2:
        for group in groups:
            if not group.path.exists():
                tokenize(group.documents, tokenizer, seed, marks).write(group.path)
            yield group.path, group.size
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, _start_worker, (folder,))
    try:
        yield from _write_in(pool, groups, (seed, marks), 2 * workers)
    finally:
        pool.shutdown(cancel_futures=True)


def _write_in(
    pool: ProcessPoolExecutor, groups: Iterator[Group], options: tuple[Any, ...], limit: int
) -> Iterator[tuple[Path, int]]:
    running: dict[Future[Path], int] = {}
    for group in groups:
        if group.path.exists():
            yield group.path, group.size
            continue
        running[pool.submit(_work, group, *options)] = group.size
        if len(running) >= limit:
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result(), running.pop(future)
    for future, size in running.items():
        yield future.result(), size


def available_workers(requested: int) -> int:
    """-1 means one worker for each CPU core this process may use."""
    if requested < -1:
        raise DataError(f"workers is {requested}; expected -1 (all cores), 0 (none) or a number")
    return len(os.sched_getaffinity(0)) if requested == -1 else requested
