"""The manifest of a checkpoint folder: step, and size and SHA-256 of every file.

It is written last, so a folder with a manifest was written to its end; it covers itself with a
hash too, so that no changed byte in the folder goes unnoticed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

NAME = "manifest.json"
VERSION = 1
_MAX_BYTES = 64 << 20
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*(/[A-Za-z0-9][A-Za-z0-9_.-]*){0,3}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


class FileRecord(NamedTuple):
    """What a file must be."""

    size: int
    """Bytes."""
    sha256: str
    """Hex digest of the contents."""


class Manifest(NamedTuple):
    """What a checkpoint folder must hold."""

    step: int
    files: dict[str, FileRecord]
    """By path relative to the folder, with forward slashes."""


def valid_name(name: str) -> bool:
    """Whether `name` is a plain relative path: no `..`, root, backslash or control character."""
    return len(name) <= 255 and _FILE_NAME.fullmatch(name) is not None


def record(path: Path) -> FileRecord:
    """Reads a file and says what it is."""
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
        return FileRecord(stream.tell(), digest)


def write(folder: Path, step: int, files: Mapping[str, FileRecord]) -> None:
    """Writes the manifest of `folder` and waits until it is on the disk."""
    with (folder / NAME).open("w", encoding="utf-8") as stream:
        stream.write(_text(step, files))
        stream.flush()
        os.fsync(stream.fileno())


def read(folder: Path) -> Manifest:
    """The manifest of `folder`. Raises ValueError, with the reason, where it is no good."""
    path = folder / NAME
    try:
        size = path.stat().st_size
        if size > _MAX_BYTES:
            raise ValueError(f"{NAME} has {size} bytes, at most {_MAX_BYTES} are read")
        text = path.read_bytes().decode("utf-8")
        manifest = _parse(json.loads(text))
    except OSError as error:
        raise ValueError(f"{NAME} cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{NAME} is not valid JSON: {error}") from error
    expected = _text(manifest.step, manifest.files)
    if text != expected:
        raise ValueError(
            f"{NAME} has been changed: sha256 {_sha256(text)}, expected {_sha256(expected)}"
        )
    return manifest


def damage(folder: Path, share: int = 0, shares: int = 1) -> str | None:
    """Compares `folder` with its manifest.

    Args:
        folder: a checkpoint.
        share, shares: of `shares` callers that divide the reading, this is number `share`; all
            of their answers together say whether the folder is whole.

    Returns:
        The first difference, with expected and actual size or hash; None where there is none.
    """
    try:
        manifest = read(folder)
        if share == 0:
            _check_listing(folder, manifest)
        for name in sorted(manifest.files)[share::shares]:
            _check_file(folder / name, name, manifest.files[name])
    except ValueError as error:
        return str(error)
    except OSError as error:
        return f"{error.filename} cannot be read: {error.strerror}"
    return None


def _check_listing(folder: Path, manifest: Manifest) -> None:
    found = set()
    for parent, folders, files in os.walk(folder):
        for name in folders + files:
            path = Path(parent, name)
            if path.is_symlink():
                raise ValueError(f"{path.relative_to(folder)} is a link, expected none")
        found |= {Path(parent, name).relative_to(folder).as_posix() for name in files}
    found.discard(NAME)
    if missing := sorted(manifest.files.keys() - found):
        raise ValueError(f"{missing[0]} is missing (expected {manifest.files[missing[0]].size} B)")
    if extra := sorted(found - manifest.files.keys()):
        raise ValueError(f"{extra[0]} is not listed in {NAME}")


def _check_file(path: Path, name: str, expected: FileRecord) -> None:
    size = path.stat().st_size
    if size != expected.size:
        raise ValueError(f"{name} has {size} bytes, expected {expected.size}")
    actual = record(path)
    if actual != expected:
        raise ValueError(f"{name} has sha256 {actual.sha256}, expected {expected.sha256}")


def _parse(data: Any) -> Manifest:
    if not isinstance(data, dict) or data.get("version") != VERSION:
        version = data.get("version") if isinstance(data, dict) else None
        raise ValueError(f"{NAME} has version {version!r}, expected {VERSION}")
    step, files = data.get("step"), data.get("files")
    if type(step) is not int or step < 0 or not isinstance(files, dict):
        raise ValueError(f"{NAME} needs a step and files, got step {step!r}")
    records = {}
    for name, entry in files.items():
        if not valid_name(name):
            raise ValueError(f"{NAME} lists {name[:80]!r}, expected a plain relative path")
        fields = entry if isinstance(entry, dict) else {}
        size, digest = fields.get("size"), fields.get("sha256")
        if type(size) is not int or size < 0 or not _SHA256.fullmatch(str(digest)):
            raise ValueError(f"{NAME} gives no size and sha256 of {name}: {str(entry)[:80]}")
        records[name] = FileRecord(size, str(digest))
    return Manifest(step, records)


def _text(step: int, files: Mapping[str, FileRecord]) -> str:
    data: dict[str, Any] = {"version": VERSION, "step": step}
    data["files"] = {name: files[name]._asdict() for name in sorted(files)}
    data["sha256"] = _sha256(json.dumps(data))
    return json.dumps(data, indent=1) + "\n"


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
