"""Datasets that are read row by row: files of JSON lines or Parquet, or a name on the hub."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rondo.pretrain.data.corpora import (
    JSON_LINES,
    PARQUET,
    field_text,
    file_kind,
    files_of,
    hub_name,
    require_hub,
)
from rondo.pretrain.data.errors import DataError

TEXT_FIELD = "text"


@dataclass(frozen=True)
class RowSource:
    """A dataset of rows with a text each."""

    name: str
    identity: list[Any]
    """What its rows depend on (JSON)."""
    open: Callable[[], Any]
    """A `datasets.IterableDataset` at its first row."""


def open_rows(path: str) -> RowSource:
    """The dataset at `path`. Raises DataError where there is none, or none that can be streamed."""
    where = Path(path).expanduser()
    if path and where.exists():
        return _local(path, where)
    name, configuration = hub_name(path)
    require_hub(path)
    revision = _revision(path, name)

    def load() -> Any:
        return _load(name, configuration, revision=revision)

    return RowSource(path, [path, revision], load)


def row_text(rows: RowSource, row: dict[str, Any]) -> str:
    """The text of a row. Raises DataError where it has none."""
    return field_text(row, TEXT_FIELD, rows.name)


def _local(path: str, where: Path) -> RowSource:
    files = files_of(where)
    builders = {"parquet" if file_kind(file) in PARQUET else "json" for file in files}
    others = [file for file in files if file_kind(file) not in (*PARQUET, *JSON_LINES)]
    if others or len(builders) > 1:
        raise DataError(
            f"{path}: streaming reads rows of JSON lines or of Parquet, one of both, and this has "
            f"{(others or files)[0].name}; without streaming it is prepared first"
        )
    stats = [(file, file.stat()) for file in files]
    identity = [[str(f.resolve()), stat.st_size, stat.st_mtime_ns] for f, stat in stats]
    names = [str(file.resolve()) for file in files]

    def load() -> Any:
        return _load(builders.copy().pop(), None, data_files=names)

    return RowSource(path, identity, load)


def _load(name: str, configuration: str | None, **options: Any) -> Any:
    import datasets

    try:
        return datasets.load_dataset(name, configuration, split="train", streaming=True, **options)
    except Exception as error:
        raise DataError(f"{name}: cannot be read: {type(error).__name__}: {error}") from error


def _revision(path: str, name: str) -> str:
    """The commit that the hub has now: a run goes on with no other."""
    from huggingface_hub import HfApi

    try:
        return str(HfApi().dataset_info(name).sha)
    except Exception as error:
        raise DataError(
            f"{path!r}: not to be had from the Hugging Face hub: {type(error).__name__}: {error}"
        ) from error
