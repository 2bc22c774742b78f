"""`samples.json`: which samples a run has consumed, written into each checkpoint.

A checkpoint and its `samples.json` appear together, so after a kill what is said to be seen is what
the run goes on from. Within a stage, sample n of a source is the n-th stretch of `sequence_length`
tokens of its documents in the order of the run's seed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rondo.errors import UserError
from rondo.models.loading import find_checkpoint
from rondo.pretrain.data.dataset import Sources, TokenDataset, content_of
from rondo.pretrain.data.errors import DataError
from rondo.pretrain.data.tokenizer import Tokenizer
from rondo.pretrain.stages import Stage

NAME = "samples.json"
VERSION = 1
_MAX_BYTES = 64 << 20


def stage_record(stage: Stage, own: TokenDataset, new: int) -> dict[str, Any]:
    """What was consumed in a stage of its own data: `new` samples."""
    begins, ends, streamed = own.ends(0), own.ends(new), own.streamed()
    sources = [
        {
            "path": source.path,
            "folder": str(folder.resolve()),
            "content": content,
            "weight": weight,
            "number": number,
            "samples": [begins[number], ends[number]],
            "streamed": number in streamed,
        }
        for source, folder, content, weight, number in zip(
            stage.sources, own.folders, own.contents, own.weights, own.numbers, strict=True
        )
    ]
    return {"name": stage.name, "new": new, "sources": sources}


@dataclass(frozen=True)
class Seen:
    """What a run had consumed at a checkpoint."""

    source: str
    """The path that it was read for."""
    record: Mapping[str, Any]

    def open(
        self, tokenizer: Tokenizer, sequence_length: int, vocab_size: int, key: str
    ) -> list[tuple[TokenDataset, int]]:
        """Datasets of its stages and how many samples of each were consumed as new, in order.

        Raises DataError, which names the recipe's `key`, where this run cannot read them: another
        sequence length or tokenizer, or token files that have changed.
        """
        there, record = f"{key}: {self.source}", self.record
        if record["sequence_length"] != sequence_length:
            raise DataError(
                f"{there} was trained on sequences of {record['sequence_length']} tokens, and "
                f"data.sequence_length is {sequence_length}; what it saw can be replayed only as "
                "it was seen"
            )
        if record["tokenizer"] != tokenizer.fingerprint():
            raise DataError(f"{there} has another tokenizer than data.tokenizer")
        found = []
        for stage in record["stages"]:
            sources = stage["sources"]
            for source in sources:
                if source.get("streamed"):
                    raise DataError(
                        f"{there} has read {source['path']} as a stream, of which no tokens were "
                        "kept to replay; prepare it (rondo prepare)"
                    )
            folders = [Path(source["folder"]) for source in sources]
            for source, folder in zip(sources, folders, strict=True):
                _require_same(folder, source["content"], there)
            chosen = Sources(
                folders,
                [source["weight"] for source in sources],
                tokenizer,
                [source["number"] for source in sources],
                [source["samples"][0] for source in sources],
            )
            dataset = TokenDataset(chosen, sequence_length, record["seed"], vocab_size=vocab_size)
            found.append((dataset, stage["new"]))
        return found

    def held_out(self, tokenizer: Tokenizer) -> Sources:
        """What it has read, for validation: each folder once, weighted by its samples."""
        read: dict[Path, int] = {}
        for stage in self.record["stages"]:
            for source in stage["sources"]:
                begin, end = source["samples"]
                folder = Path(source["folder"])
                read[folder] = read.get(folder, 0) + end - begin
        read = {folder: count for folder, count in read.items() if count}
        return Sources([*read], [float(count) for count in read.values()], tokenizer)

    def digest(self) -> str:
        """SHA-256 of the record, as hex."""
        return hashlib.sha256(json.dumps(self.record, sort_keys=True).encode()).hexdigest()

    def write(self, path: Path) -> None:
        """Writes it to a file, which is whole or not there."""
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(".tmp")
        beside.write_text(json.dumps({"source": self.source, "seen": self.record}, indent=1))
        beside.replace(path)


def read_seen(source: str, copy: Path | None = None) -> Seen:
    """What the run (its newest checkpoint) or the checkpoint `source` has seen.

    A `copy` that `Seen.write` made for the same `source` goes first: what a run replays must not
    change when the other run goes on. Raises DataError where nothing says it.
    """
    if copy is not None and copy.is_file():
        kept = json.loads(copy.read_text())
        if kept["source"] == source:
            return Seen(source, kept["seen"])
    try:
        checkpoint = find_checkpoint(Path(source))
    except UserError as error:
        raise DataError(f"replay.source: {error}") from None
    path = checkpoint / NAME
    if not path.is_file():
        raise DataError(
            f"replay.source: {checkpoint} does not say which samples it has seen ({NAME} is "
            "missing: it is of an older rondo); let that run save once more"
        )
    if path.stat().st_size > _MAX_BYTES:
        raise DataError(f"replay.source: {path} is larger than {_MAX_BYTES} bytes")
    try:
        record = json.loads(path.read_text())
    except ValueError as error:
        raise DataError(f"replay.source: {path} cannot be read: {error}") from None
    if not isinstance(record, dict) or record.get("version") != VERSION:
        raise DataError(f"replay.source: {path} is not of version {VERSION}")
    return Seen(source, record)


def _require_same(folder: Path, content: list[Any], there: str) -> None:
    try:
        same = content_of(folder, "train") == content
    except OSError as error:
        raise DataError(f"{there} read {folder}, which is not there any more: {error}") from None
    if not same:
        raise DataError(f"{there} read {folder}, whose tokens have changed since")
