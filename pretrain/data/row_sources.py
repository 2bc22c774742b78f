"""Datasets that are read row by row: files of JSON lines or Parquet, or a name on the hub."""

from __future__ import annotations

import os
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
    """What its rows depend on (JSON): `[path, commit]` of a dataset on the hub, else
    `[file, bytes, time of change]` of each file."""
    open: Callable[[], Any]
    """A `datasets.IterableDataset` at its first row."""


def open_rows(path: str, saved: list[Any] | None = None) -> RowSource:
    """The dataset at `path`.

    Args:
        path: a file or folder, else a name on the hub.
        saved: the `identity` that a run goes on with. Of the hub, that commit is opened, whatever
            came after it; local files have to be those.

    Raises:
        DataError: there is no such dataset, it cannot be streamed, or files have changed.
    """
    where = Path(path).expanduser()
    if path and where.exists():
        return _local(path, where, saved)
    name, configuration = hub_name(path)
    if os.environ.get("HF_HUB_OFFLINE"):
        raise DataError(
            f"{path!r}: is streamed from the Hugging Face hub, which HF_HUB_OFFLINE rules out; "
            "without streaming, what was downloaded before is prepared"
        )
    require_hub(path)
    revision = saved[1] if saved and saved[0] == path else _revision(path, name)

    def load() -> Any:
        return _load(name, configuration, revision=revision)

    return RowSource(path, [path, revision], load)


def row_text(rows: RowSource, row: dict[str, Any]) -> str:
    """The text of a row. Raises DataError where it has none."""
    return field_text(row, TEXT_FIELD, rows.name)


def _local(path: str, where: Path, saved: list[Any] | None) -> RowSource:
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
    _require_unchanged(path, where, saved, identity)
    names = [str(file.resolve()) for file in files]

    def load() -> Any:
        return _load(builders.copy().pop(), None, data_files=names)

    return RowSource(path, identity, load)


def _require_unchanged(
    path: str, where: Path, saved: list[Any] | None, found: list[list[Any]]
) -> None:
    """Raises DataError that names a file which is not as it was. What the recipe names elsewhere
    now is another source, which the run's fingerprint tells."""
    if not saved:
        return
    if saved[0] == path:
        raise DataError(
            f"{path}: was streamed from the hub at commit {saved[1]}, and is a local path now; "
            "the run's place in it is lost"
        )
    before = {file: facts for file, *facts in saved}
    now = {file: facts for file, *facts in found}
    if not any(Path(file).is_relative_to(where.resolve()) for file in before):
        return
    for file in sorted(before.keys() | now):
        if before.get(file) != now.get(file):
            what = "is new" if file not in before else "is gone" if file not in now else "changed"
            raise DataError(
                f"{path}: {file} {what} since the checkpoint, so the run's place in what it "
                "streams is lost; checkpoint.init_from takes its parameters alone"
            )


def _load(name: str, configuration: str | None, **options: Any) -> Any:
    import datasets

    try:
        return datasets.load_dataset(name, configuration, split="train", streaming=True, **options)
    except Exception as error:
        commit = f" at commit {options['revision']}" if "revision" in options else ""
        raise DataError(
            f"{name}{commit}: cannot be read: {type(error).__name__}: {error}"
        ) from error


def _revision(path: str, name: str) -> str:
    """The commit that the hub has now, with which a run begins."""
    from huggingface_hub import HfApi

    try:
        return str(HfApi().dataset_info(name).sha)
    except Exception as error:
        raise DataError(
            f"{path!r}: not to be had from the Hugging Face hub: {type(error).__name__}: {error}"
        ) from error
