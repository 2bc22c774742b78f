"""The folder of checkpoints: names, what is in it, putting a new one in place.

Names that begin with a dot are not checkpoints: `.step-000000100.partial` is being written,
`.step-000000100.old` is being replaced, `.step-000000100.removed` is being deleted. A file
`.step-000000100.hold` says that somebody is going to read that checkpoint, for as long as its time
stays fresh: whoever reads touches it, and a dead reader's hold ends by itself.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from pathlib import Path

_STEP = re.compile(r"step-(\d{9,18})", re.ASCII)
_LEFTOVER = re.compile(r"\.(step-\d{9,18})\.(partial|old|removed)", re.ASCII)

HOLD_SECONDS = 900.0
"""How long a hold counts after it was last touched."""


def step_folder(folder: Path, step: int) -> Path:
    """Where the checkpoint of `step` is."""
    return folder / f"step-{step:09d}"


def partial_folder(folder: Path, step: int) -> Path:
    """Where the checkpoint of `step` is written."""
    return _aside(step_folder(folder, step), "partial")


def step_of(path: Path) -> int | None:
    """The step a checkpoint's name says; None for any other name."""
    match = _STEP.fullmatch(path.name)
    return int(match[1]) if match else None


def steps(folder: Path) -> list[int]:
    """Steps of the checkpoints in `folder`, newest first, valid or not."""
    found = [step_of(path) for path in folder.iterdir() if path.is_dir()]
    return sorted((step for step in found if step is not None), reverse=True)


def sync(path: Path) -> None:
    """Waits until a file, or the list of names in a folder, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_partial(folder: Path, step: int, parts: list[str]) -> None:
    """An empty folder to write a checkpoint in."""
    partial = partial_folder(folder, step)
    if partial.exists():
        shutil.rmtree(partial)
    for part in parts:
        (partial / part).mkdir(parents=True)


def publish(folder: Path, step: int) -> None:
    """Renames a complete partial folder to its final name."""
    partial, final = partial_folder(folder, step), step_folder(folder, step)
    for parent, _, _ in os.walk(partial):
        sync(Path(parent))
    replaced = _aside(final, "old")
    if final.exists():
        final.rename(replaced)  # a folder cannot be replaced in one go; `recover` undoes this
    partial.rename(final)
    sync(folder)
    if replaced.exists():
        shutil.rmtree(replaced)


def hold(folder: Path, step: int) -> None:
    """Keeps the checkpoint of `step`, which may be still to come, from being pruned."""
    _aside(step_folder(folder, step), "hold").touch()


def is_held(folder: Path, step: int) -> bool:
    """Whether somebody is going to read the checkpoint of `step`, or reads it."""
    try:
        touched = _aside(step_folder(folder, step), "hold").stat().st_mtime
    except FileNotFoundError:
        return False
    return time.time() - touched < HOLD_SECONDS


def prune(folder: Path, keep: int, newest: int) -> None:
    """Deletes all but the `keep` newest checkpoints (0 keeps all), never that of step `newest` nor
    one that is held."""
    for step in steps(folder)[keep:] if keep else []:
        if step != newest and not is_held(folder, step):
            final = step_folder(folder, step)
            removed = _aside(final, "removed")
            final.rename(removed)  # what is half deleted must not look like a checkpoint
            shutil.rmtree(removed)


def recover(folder: Path) -> None:
    """Makes the folder if there is none, and clears away what interrupted processes left."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in list(folder.iterdir()):
        match = _LEFTOVER.fullmatch(path.name)
        if match is None:
            continue
        if match[2] == "old" and not (folder / match[1]).exists():
            path.rename(folder / match[1])
        else:
            shutil.rmtree(path)


def _aside(final: Path, kind: str) -> Path:
    return final.with_name(f".{final.name}.{kind}")
