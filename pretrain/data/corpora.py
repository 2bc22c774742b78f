"""Text from anywhere, one document at a time.

Files are read through Hugging Face `datasets` (compressed ones included), which is imported
only when it is needed: the embedded corpora do without.
"""

from __future__ import annotations

import difflib
import glob
import json
import os
import re
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rondo.pretrain.data import embedded
from rondo.pretrain.data.errors import DataError

TEXT = (".txt", ".text", ".md")
JSON_LINES = (".jsonl", ".ndjson", ".json")
PARQUET = (".parquet",)
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
_ABSENT = "no such file or folder, and not to be had from the Hugging Face hub"
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(:[\w.-]+)?")


@dataclass(frozen=True)
class Corpus:
    """Documents to be tokenised."""

    name: str
    """How messages and cards call it."""
    identity: list[Any]
    """What the text depends on (JSON): a prepared folder is reused while this stays the same."""
    total_bytes: int | None
    """Size of the files, for the progress bar; None when it is not known beforehand."""
    documents: Callable[[], Iterator[str]]
    """Starts over at the first document; the order is always the same."""


def open_corpus(path: str, text_field: str = "text", document_bytes: int = 65536) -> Corpus:
    """The corpus at `path`: an embedded name, a file, a folder of files, or a hub name.

    Text files are cut into documents of about `document_bytes` bytes (0: one file, one
    document), between paragraphs where there are any; JSON lines, Parquet rows and hub rows
    are one document each, their text in `text_field`.

    Raises DataError when there is nothing of that name, or nothing that can be read.
    """
    if path in embedded.EMBEDDED:
        return Corpus(path, embedded.identity(), None, embedded.EMBEDDED[path])
    where = Path(path).expanduser()
    if not path or not where.exists():
        return _hub_corpus(path, text_field)
    files = files_of(where)
    stats = [file.stat() for file in files]
    identity: list[Any] = [
        [str(file.resolve()), stat.st_size, stat.st_mtime_ns]
        for file, stat in zip(files, stats, strict=True)
    ]

    def documents() -> Iterator[str]:
        for file in files:
            yield from _file_documents(file, text_field, document_bytes)

    squeezed = any(file.suffix in COMPRESSED for file in files)
    total = None if squeezed else sum(stat.st_size for stat in stats)
    return Corpus(path, identity, total, documents)


def file_kind(path: Path) -> str:
    """The suffix that says what a file holds, compression set aside."""
    return (path.with_suffix("") if path.suffix in COMPRESSED else path).suffix.lower()


def files_of(where: Path) -> list[Path]:
    """The files with text at a path. Raises DataError where there are none."""
    known = TEXT + JSON_LINES + PARQUET
    if where.is_file():
        if file_kind(where) not in known:
            raise DataError(
                f"{where}: cannot tell what it holds by its suffix {file_kind(where)!r}; "
                f"expected one of {', '.join(known)}, or one of these with {'/'.join(COMPRESSED)}"
            )
        return [where]
    if (where / "train.idx").exists():
        raise DataError(f"{where}: is already prepared (it holds train.idx); give its source")
    files = sorted(p for p in where.rglob("*") if p.is_file() and file_kind(p) in known)
    if not files:
        raise DataError(f"{where}: empty corpus: no file with one of {', '.join(known)} in it")
    return files


def _file_documents(file: Path, text_field: str, document_bytes: int) -> Iterator[str]:
    kind = file_kind(file)
    if kind in PARQUET:
        yield from _parquet_documents(file, text_field)
    elif kind in JSON_LINES:
        for number, line in enumerate(_lines(file), start=1):
            if line.strip():
                yield _json_text(line, text_field, f"{file}:{number}")
    else:
        yield from cut(_lines(file), document_bytes)


def cut(lines: Iterator[str], document_bytes: int) -> Iterator[str]:
    """Join lines (with their ends) into documents.

    A document ends at the first blank line after `document_bytes` bytes, or at the end of a line
    after twice as many; 0 joins everything.
    """
    held: list[str] = []
    size = 0
    for line in lines:
        held.append(line)
        size += len(line.encode("utf-8", "replace"))
        full = (size >= document_bytes and not line.strip()) or size >= 2 * document_bytes
        if document_bytes and full:
            yield "".join(held)
            held, size = [], 0
    if held:
        yield "".join(held)


def _json_text(line: str, text_field: str, where: str) -> str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not a JSON object: {error}") from None
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected a JSON object on each line, got {type(row).__name__}")
    return field_text(row, text_field, where)


def field_text(row: dict[str, Any], text_field: str, where: str) -> str:
    """The text of a row of a dataset. Raises DataError where it has none; `where` is its place."""
    if text_field not in row:
        near = difflib.get_close_matches(text_field, row, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        names = ", ".join(map(repr, list(row)[:20])) or "none"
        raise DataError(f"{where}: no field {text_field!r}; its fields are {names}{hint}")
    text = row[text_field]
    if not isinstance(text, str):
        raise DataError(
            f"{where}: field {text_field!r} is {str(text)[:40]!r} ({type(text).__name__}), "
            "expected a string"
        )
    return text


def _lines(file: Path) -> Iterator[str]:
    """Lines with their ends; line ends become "\\n", bytes that are not UTF-8 become U+FFFD."""
    rows = _read(
        "text", file, keep_linebreaks=True, encoding="utf-8-sig", encoding_errors="replace"
    )
    return (row["text"] for row in rows)


def _parquet_documents(file: Path, text_field: str) -> Iterator[str]:
    import pyarrow.parquet

    try:
        names = pyarrow.parquet.read_schema(file).names
    except Exception as error:
        raise DataError(f"{file}: not a Parquet file: {error}") from None
    if text_field not in names:
        field_text(dict.fromkeys(names), text_field, str(file))
    rows = _read("parquet", file, columns=[text_field])
    for number, row in enumerate(rows, start=1):
        yield field_text(row, text_field, f"{file}: row {number}")


def _read(builder: str, file: Path, **options: Any) -> Iterator[dict[str, Any]]:
    import datasets

    try:
        yield from datasets.load_dataset(
            builder,
            data_files=[glob.escape(str(file.resolve()))],
            split="train",
            streaming=True,
            **options,
        )
    except Exception as error:
        raise DataError(f"{file}: cannot be read: {type(error).__name__}: {error}") from error


def _hub_corpus(path: str, text_field: str) -> Corpus:
    hub_name(path)

    def documents() -> Iterator[str]:
        for number, row in enumerate(_load_from_hub(path), start=1):
            yield field_text(row, text_field, f"{path}: row {number}")

    return Corpus(path, [path], None, documents)


def hub_name(path: str) -> tuple[str, str | None]:
    """`owner/name` and configuration of `owner/name:configuration`. Raises DataError for what looks
    like something else."""
    near = difflib.get_close_matches(path, embedded.EMBEDDED, n=1, cutoff=0.6)
    known = f"embedded corpora are {', '.join(embedded.EMBEDDED)}"
    hint = f"; did you mean {near[0]!r}?" if near else ""
    looks_local = file_kind(Path(path)) in TEXT + JSON_LINES + PARQUET
    if near or looks_local or not HUB_NAME.fullmatch(path):
        raise DataError(f"{path!r}: no such file, folder or corpus; {known}{hint}")
    name, _, configuration = path.partition(":")
    return name, configuration or None


def require_hub(path: str) -> None:
    """Raises DataError where the hub cannot be reached for `path`."""
    # Without a network the hub's client retries for half a minute before it says so.
    host = os.environ.get("HF_ENDPOINT", "https://huggingface.co").split("//")[-1].split("/")[0]
    proxied = any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY"))
    if not proxied and not os.environ.get("HF_HUB_OFFLINE"):
        try:
            socket.getaddrinfo(host.split(":")[0], 443)
        except OSError as error:
            raise DataError(
                f"{path!r}: {_ABSENT}: {host} cannot be reached ({error}); "
                "HF_HUB_OFFLINE=1 reads what was downloaded before"
            ) from None


def _load_from_hub(path: str) -> Any:
    """The train split of `owner/name` or `owner/name:configuration`."""
    require_hub(path)
    import datasets

    name, configuration = hub_name(path)
    try:
        return datasets.load_dataset(name, configuration, split="train")
    except Exception as error:
        raise DataError(f"{path!r}: {_ABSENT}: {type(error).__name__}: {error}") from error
