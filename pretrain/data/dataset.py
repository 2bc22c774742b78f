"""Samples and batches for the training loop.

Step n trains on samples [n * B, (n + 1) * B), whatever the number of ranks. A sample is a pure
function of (sources, sequence length, seed, index): the index is all there is to resume.
"""

from __future__ import annotations

import hashlib
import json
import queue
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch

from rondo.pretrain.data.card import CARD, read_card
from rondo.pretrain.data.errors import DataError
from rondo.pretrain.data.mixture import Mixture
from rondo.pretrain.data.packing import Stream
from rondo.pretrain.data.streaming import StreamedSource
from rondo.pretrain.data.token_files import open_split
from rondo.pretrain.data.tokenizer import Tokenizer

Split = Literal["train", "validation"]
Item = TypeVar("Item")
IGNORED = -100


@dataclass(frozen=True)
class Sources:
    """Prepared folders, their weights, and the tokenizer they share."""

    folders: list[Path]
    weights: list[float]
    tokenizer: Tokenizer
    numbers: list[int] | None = None
    """What each is called in the run (`Sample.source`, and the seed of its order); None: 0, 1..."""
    begins: list[int] | None = None
    """Samples of each that the run has read before; None: none."""
    streamed: Mapping[int, StreamedSource] = field(default_factory=dict)
    """What is tokenised while it is trained on, by number; its folder has the held-out text."""

    def select(
        self, numbers: Sequence[int], weights: Sequence[float], begins: Sequence[int]
    ) -> Sources:
        """Those of `numbers`, for a part of a run."""
        folders = [self.folders[number] for number in numbers]
        return Sources(folders, [*weights], self.tokenizer, [*numbers], [*begins], self.streamed)


@dataclass(frozen=True)
class Sample:
    """One sequence of s tokens and the token after it."""

    tokens: np.ndarray
    """int64 `(s + 1,)`."""
    targets: np.ndarray
    """Next tokens, int64 `(s,)`; -100 where the next token is of another document, or is one that
    no loss is on."""
    segment_ids: np.ndarray
    """Document of each position, int32 `(s,)`, from 0 upward."""
    source: int
    """Position in the recipe's list of sources."""


@dataclass(frozen=True)
class Batch:
    """Sequences of one micro-batch; all tensors `(B, s)`."""

    tokens: torch.Tensor
    targets: torch.Tensor
    segment_ids: torch.Tensor

    def to(self, device: torch.device) -> Batch:
        """The same on `device`."""
        return Batch(*(part.to(device) for part in (self.tokens, self.targets, self.segment_ids)))


class TokenDataset:
    """The mixture of all sources' `split`, cut into sequences.

    Training documents are shuffled anew each epoch by `seed`; validation keeps the files' order,
    so that its first samples are the same in every run. A source that is used up starts over.
    Validation leaves out sources that hold nothing out; there has to be one that does.

    Raises DataError for damaged files and ids that `vocab_size` (default: the tokenizer's) does
    not cover.
    """

    def __init__(
        self,
        sources: Sources,
        sequence_length: int,
        seed: int,
        split: Split = "train",
        vocab_size: int | None = None,
    ) -> None:
        if sequence_length < 1:
            raise DataError(f"data.sequence_length is {sequence_length}; expected at least 1")
        if split not in ("train", "validation"):
            raise DataError(f"split is {split!r}; expected 'train' or 'validation'")
        self.tokenizer = sources.tokenizer
        self.sequence_length = sequence_length
        self.vocab_size = vocab_size or sources.tokenizer.vocab_size
        known = min(self.vocab_size, sources.tokenizer.vocab_size)  # a model may have more rows
        self.known_ids = known
        self._streams: list[Stream | StreamedSource] = []
        self.contents: list[list[Any]] = []
        self.numbers: list[int] = []
        self.begins: list[int] = []
        self.folders: list[Path] = []
        weights = []
        numbers = sources.numbers or [*range(len(sources.folders))]
        begins = sources.begins or [0] * len(numbers)
        for number, begin, folder, weight in zip(
            numbers, begins, sources.folders, sources.weights, strict=True
        ):
            if split == "train" and number in sources.streamed:
                streamed = sources.streamed[number]
                self._streams.append(streamed)
                self.contents.append(streamed.identity)
            else:
                if split == "validation" and not (folder / "validation.idx").is_file():
                    continue
                file = open_split(folder, split, known)
                if split == "validation" and file.num_tokens == 0:
                    continue
                self._streams.append(Stream(file, (seed, number) if split == "train" else None))
                self.contents.append(content_of(folder, split))
            self.numbers.append(number)
            self.begins.append(begin if split == "train" else 0)
            self.folders.append(folder)
            weights.append(weight)
        if split == "validation" and not weights:
            raise DataError(
                "no source holds out documents for validation: one of "
                f"{', '.join(map(str, sources.folders))} needs two documents and a "
                "validation_fraction above 0; or set evals.batches to 0"
            )
        self.mixture = Mixture(weights)
        self.weights = weights
        self._description: dict[str, Any] = {
            "folders": self.contents,
            "weights": weights,
            "tokenizer": sources.tokenizer.fingerprint(),
            "sequence_length": sequence_length,
            "seed": seed,
            "split": split,
        }
        if split == "train" and (numbers != [*range(len(numbers))] or any(begins)):
            self._description |= {"numbers": numbers, "begins": begins}

    def sample(self, index: int) -> Sample:
        """The sequence at global `index`."""
        which, k = self.mixture[index]
        stream = self._streams[which]
        s = self.sequence_length
        start = (self.begins[which] + k) * s
        tokens, segments = stream.window(start, s + 1)
        stream.check(tokens, self.known_ids)
        valid = segments[1:] == segments[:-1]
        scored = stream.scored(start, s + 1)
        if scored is not None:
            valid &= scored[1:]
        targets = np.where(valid, tokens[1:], IGNORED)
        return Sample(tokens, targets, segments[:-1], self.numbers[which])

    def source(self, index: int) -> int:
        """Position in the recipe's list of sources of the sample at global `index`."""
        return self.numbers[self.mixture[index][0]]

    def batch(self, indices: Sequence[int]) -> Batch:
        """The sequences at `indices`, stacked."""
        return stack([self.sample(i) for i in indices])

    def epochs(self, samples: int) -> dict[int, float]:
        """How often each source (by its number in the recipe) was read after `samples` samples;
        how large those are that are streamed is not known."""
        ends, length = self.ends(samples), self.sequence_length
        return {number: ends[number] * length / n for number, n in self.unique_tokens().items()}

    def ends(self, samples: int) -> dict[int, int]:
        """Samples of each source (by its number) that were read after `samples` samples, those
        before the first of them included."""
        counts = self.mixture.counts(samples)
        parts = zip(self.numbers, self.begins, counts, strict=True)
        return {number: begin + count for number, begin, count in parts}

    def unique_tokens(self) -> dict[int, int]:
        """Tokens of each source (by its number in the recipe) that is not streamed."""
        return {
            number: stream.file.num_tokens
            for number, stream in zip(self.numbers, self._streams, strict=True)
            if isinstance(stream, Stream)
        }

    def streamed(self) -> dict[int, StreamedSource]:
        """The sources that are streamed, by number."""
        pairs = zip(self.numbers, self._streams, strict=True)
        return {number: s for number, s in pairs if isinstance(s, StreamedSource)}

    def token_counts(self) -> np.ndarray:
        """Occurrences of each id in the first tokens of each source, float64 `(vocab_size,)`; each
        source scaled so that its share of the sum is its weight's. What is streamed is left out."""
        tokens = sum(self.unique_tokens().values())
        total = np.zeros(self.vocab_size)
        for stream, share in zip(self._streams, self.mixture.shares, strict=True):
            if not isinstance(stream, Stream):
                continue
            counts = stream.file.counts(self.vocab_size)
            total += counts * (share * tokens / counts.sum())
        return total

    def fingerprint(self) -> str:
        """Hash of everything that samples depend on."""
        text = json.dumps(self._description, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def stack(samples: Sequence[Sample]) -> Batch:
    """A batch of samples."""
    return Batch(
        torch.from_numpy(np.stack([s.tokens[:-1] for s in samples])),
        torch.from_numpy(np.stack([s.targets for s in samples])),
        torch.from_numpy(np.stack([s.segment_ids for s in samples])),
    )


def content_of(folder: Path, split: str) -> list[object]:
    """What identifies a split's tokens: checksums, or sizes in a folder without a card."""
    names = [f"{split}.bin", f"{split}.idx"]
    if (folder / f"{split}.loss.bin").is_file():
        names.append(f"{split}.loss.bin")
    if (folder / CARD).is_file():
        files = read_card(folder)["files"]
        return [files[name]["sha256"] for name in names]
    return [(folder / name).stat().st_size for name in names]


def rank_indices(
    step: int, global_batch: int, rank: int, world: int, micro: int
) -> list[list[int]]:
    """Sample indices of `rank`'s micro-batches in a step.

    Each rank has an equal, contiguous part of the global batch, in micro-batches of `micro`
    sequences (the last may be smaller, on all ranks alike).

    Raises DataError when the global batch cannot be divided among `world` ranks.
    """
    if min(global_batch, micro) < 1:
        raise DataError(
            f"data.global_batch_size is {global_batch} and data.micro_batch_size {micro}; "
            "expected at least 1"
        )
    if global_batch % world:
        raise DataError(
            f"data.global_batch_size is {global_batch}; expected a multiple of the "
            f"{world} data-parallel ranks"
        )
    share = global_batch // world
    start = step * global_batch + rank * share
    mine = range(start, start + share)
    return [list(mine[i : i + micro]) for i in range(0, share, micro)]


def prefetch(items: Iterable[Item], depth: int = 2) -> Iterator[Item]:
    """The same items, made ahead (up to `depth` of them) in a background thread.

    What `items` raises is raised here. Closing the iterator ends the thread.
    """
    made: queue.Queue[tuple[bool, Item | BaseException | None]] = queue.Queue(depth)
    stop = threading.Event()

    def put(going_on: bool, item: Item | BaseException | None) -> None:
        while not stop.is_set():
            try:
                made.put((going_on, item), timeout=0.1)
                return
            except queue.Full:
                continue

    def work() -> None:
        try:
            for item in items:
                put(True, item)
                if stop.is_set():
                    return
            put(False, None)
        except BaseException as error:
            put(False, error)

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            going_on, item = made.get()
            if going_on:
                yield item  # type: ignore[misc]
            elif item is None:
                return
            else:
                raise item  # type: ignore[misc]
    finally:
        stop.set()
        thread.join()
