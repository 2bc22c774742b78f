"""Saves and loads checkpoints on any number of ranks.

A checkpoint is a folder of safetensors and JSON files with a manifest:

    step-000001000/{model,optimizer}/*.safetensors  model/config.json  state.json  manifest.json

Each rank writes its own slices beside the final name, rank 0 writes the manifest last and
renames the folder into place, so that a reader sees a whole checkpoint or none. Nothing that is
read from a checkpoint is unpickled.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import warnings
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp

from rondo.models import loading, manifest
from rondo.parallel.checkpoint import files
from rondo.parallel.checkpoint.changes import Changes, changes
from rondo.parallel.checkpoint.collective import CheckpointError, Collective
from rondo.parallel.checkpoint.staging import (
    StagedPlanner,
    StagedTensor,
    Staging,
    StreamingWriter,
    Tensors,
    shard_name,
)

logger = logging.getLogger(__name__)
STATE = "state.json"
_MAX_STATE_BYTES = 256 << 20


class Checkpointer:
    """The checkpoints of one run. All methods are collective: every rank calls them alike.

    One process at a time (or one process group) may own `folder`: what others left half done is
    cleared away at the start. Readers need no Checkpointer.

    Args:
        folder: holds one folder a checkpoint; made where it is missing.
        keep: how many of the newest stay; 0 keeps all.
        asynchronous: write in a background thread. `save` then only waits for a copy of the
            tensors in host memory, which is kept for the next save.

    Raises:
        CheckpointError: `folder` cannot be made or written to.
    """

    def __init__(self, folder: Path, *, keep: int, asynchronous: bool = True) -> None:
        if keep < 0:
            raise CheckpointError(f"checkpoint.keep must be at least 0, got {keep}")
        # On one process there is nothing to coordinate, and nothing to warn of.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable")
        self.folder = Path(folder)
        self._keep = keep
        self._ranks, self._writers = Collective(), Collective()
        self._staging = Staging(keep=asynchronous)
        self._thread = ThreadPoolExecutor(1, "checkpoint") if asynchronous else None
        self._pending: Future[None] | None = None
        self._warned: set[Path] = set()
        self._ranks.first(f"checkpoints in {folder}", self._open)

    def _open(self) -> None:
        files.recover(self.folder)
        if not os.access(self.folder, os.W_OK | os.X_OK):
            raise CheckpointError(f"no permission to write in {self.folder}")

    def save(
        self,
        step: int,
        tensors: Tensors,
        state: Mapping[str, Any],
        extra_files: Mapping[str, str | bytes] | None = None,
    ) -> None:
        """Saves a checkpoint; waits for the one before.

        Args:
            step: names the checkpoint; one of the same step is replaced.
            tensors: by part ("model", "optimizer") and name. A plain tensor must be the same on
                all ranks and is written once. They may be changed as soon as this returns.
            state: anything JSON can hold; floats read back exactly. Rank 0's is written.
            extra_files: contents by path inside the checkpoint ("model/config.json").

        Raises:
            CheckpointError: the save before this one failed (this one is then not begun), or,
                when not asynchronous, this one did. Earlier checkpoints are untouched.
        """
        self.wait()
        texts = {STATE: json.dumps(state, indent=1), **(extra_files or {})}
        for name in [*tensors, *texts]:
            if not manifest.valid_name(name) or name == manifest.NAME:
                raise CheckpointError(f"{name!r} cannot be a file of a checkpoint")
        staged = self._staging.stage(tensors)
        if self._thread is None:
            self._write(step, staged, texts)
        else:
            self._pending = self._thread.submit(self._write, step, staged, texts)

    def wait(self) -> None:
        """Waits for the save in progress; raises CheckpointError where it failed."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    @property
    def failed(self) -> bool:
        """Whether this rank knows that the save in progress failed. Not collective: other ranks
        may learn it a moment later, so agree on it before acting (`check` does)."""
        pending = self._pending
        return pending is not None and pending.done() and pending.exception() is not None

    def check(self) -> None:
        """Raises CheckpointError on all ranks if the background save has failed on any; does not
        wait for it. Costs a small exchange between ranks."""
        if any(self._ranks.each("checkpoint", lambda: self.failed)):
            self.wait()

    def close(self) -> None:
        """Waits for the save in progress and ends the background thread."""
        try:
            self.wait()
        finally:
            if self._thread is not None:
                self._thread.shutdown()

    def found(self, find: Callable[[], Path]) -> Path:
        """What `find` finds on rank 0: the run that it looks at may save while ranks look, each at
        its own time. Raises CheckpointError where it finds none."""
        return self._ranks.first("checkpoint", find)

    def newest(self) -> Path | None:
        """The valid checkpoint with the highest step; damaged ones are passed over, with one
        warning each. None where the folder has no checkpoint at all.

        Raises:
            CheckpointError: there are checkpoints, and all are damaged: what was trained is not to
                be mistaken for nothing.
        """
        self.wait()
        steps = self._ranks.first("checkpoints", lambda: files.steps(self.folder))
        for step in steps:
            path = files.step_folder(self.folder, step)
            problem = self._damage(path)
            if problem is None:
                return path
            if self._ranks.rank == 0 and path not in self._warned:
                logger.warning("damaged checkpoint %s is passed over: %s", path, problem)
            self._warned.add(path)
        if steps:
            raise CheckpointError(
                f"checkpoint.resume: none of the {len(steps)} checkpoint(s) in {self.folder} is "
                "valid, so there is nothing to go on from; to start over, give another --name or "
                "move that folder away"
            )
        return None

    def changes(self, path: Path, tensors: Tensors, optional: Collection[str]) -> Changes:
        """How `tensors` differ in name from what is stored, where a run that starts from the
        checkpoint of another may: in `optional` tensors of the model, and in what is trained."""
        what = f"checkpoint {path}"
        stored = self._ranks.first(
            what, lambda: {part: set(loading.tensor_index(path / part)) for part in tensors}
        )
        return changes(stored, self._all_names(what, tensors), optional)

    def _all_names(self, what: str, tensors: Tensors) -> dict[str, set[str]]:
        """The names of all ranks' tensors, by part."""
        names = self._ranks.each(what, lambda: {part: set(tensors[part]) for part in tensors})
        return {part: set().union(*(of_rank[part] for of_rank in names)) for part in tensors}

    def load(
        self, path: Path, tensors: Tensors, *, dropped: Mapping[str, Collection[str]] | None = None
    ) -> dict[str, Any]:
        """Fills `tensors` in place from a checkpoint written under any layout.

        Args:
            path: a checkpoint folder.
            tensors: by part and name, as for `save`; parts that are left out are not read.
            dropped: names by part that may be stored and are not read (`changes`).

        Returns:
            The saved state.

        Raises:
            CheckpointError: the checkpoint is damaged, or names, shapes or types differ from
                those of `tensors`; no tensor has been touched then.
        """
        self.wait()
        path, what = Path(path), f"checkpoint {path}"
        if problem := self._damage(path):
            raise CheckpointError(f"{what}: {problem}")
        known = self._all_names(what, tensors)
        for part, names in (dropped or {}).items():
            known[part].update(names)
        state = self._ranks.each(what, lambda: self._compare(path, tensors, known))[0]
        for part, by_name in tensors.items():
            with self._ranks.reporting(what):
                dcp.load(
                    dict(by_name),
                    storage_reader=dcp.HuggingFaceStorageReader(str(path / part)),
                    planner=dcp.DefaultLoadPlanner(flatten_state_dict=False),
                    process_group=self._ranks.group,
                    no_dist=self._ranks.group is None,
                )
        return state

    def _damage(self, path: Path) -> str | None:
        """What is wrong with a checkpoint; the ranks share the reading."""

        def own_share() -> str | None:
            if not path.is_dir():
                return "no such folder"
            return manifest.damage(path, self._ranks.rank, self._ranks.size) or _misnamed(path)

        problems = self._ranks.each(f"checkpoint {path}", own_share)
        return next((problem for problem in problems if problem is not None), None)

    def _compare(
        self, path: Path, tensors: Tensors, known: Mapping[str, set[str]]
    ) -> dict[str, Any]:
        """Checks that `tensors` are what is stored; returns the state."""
        for part, by_name in tensors.items():
            index = loading.tensor_index(path / part)
            if problem := loading.difference(index, by_name, known[part]):
                raise CheckpointError(f"{part}: {problem}")
        return loading.read_json(path / STATE, _MAX_STATE_BYTES)

    def _write(
        self,
        step: int,
        staged: Mapping[str, Mapping[str, StagedTensor]],
        texts: Mapping[str, str | bytes],
    ) -> None:
        """Writes and publishes a checkpoint; runs in the background thread on all ranks."""
        ranks, partial = self._writers, files.partial_folder(self.folder, step)
        what = f"saving checkpoint {files.step_folder(self.folder, step)}"
        try:
            ranks.first(what, lambda: files.make_partial(self.folder, step, [*staged]))
            for part, by_name in staged.items():
                with ranks.reporting(what):
                    dcp.save(
                        dict(by_name),
                        storage_writer=StreamingWriter(partial / part),
                        planner=StagedPlanner(),
                        process_group=ranks.group,
                        no_dist=ranks.group is None,
                    )
            records = ranks.each(what, lambda: self._own_records(partial, [*staged], texts))
            listed = {name: item for of_rank in records for name, item in of_rank.items()}
            ranks.first(what, lambda: self._publish(step, partial, listed))
        except CheckpointError:
            with contextlib.suppress(CheckpointError):  # the first error is the one to report
                ranks.first(what, lambda: shutil.rmtree(partial, ignore_errors=True))
            raise

    def _own_records(
        self, partial: Path, parts: list[str], texts: Mapping[str, str | bytes]
    ) -> dict[str, manifest.FileRecord]:
        """Sizes and hashes of what this rank wrote; rank 0 writes the small files first."""
        names = [f"{part}/{shard_name(self._writers.rank + 1)}" for part in parts]
        names = [name for name in names if (partial / name).exists()]
        if self._writers.rank == 0:
            for name, text in texts.items():
                (partial / name).parent.mkdir(parents=True, exist_ok=True)
                (partial / name).write_bytes(text.encode() if isinstance(text, str) else text)
                files.sync(partial / name)
            names += texts
        return {name: manifest.record(partial / name) for name in names}

    def _publish(self, step: int, partial: Path, listed: Mapping[str, manifest.FileRecord]) -> None:
        manifest.write(partial, step, listed)
        files.publish(self.folder, step)
        files.prune(self.folder, self._keep, step)


def _misnamed(path: Path) -> str | None:
    named, step = files.step_of(path), manifest.read(path).step
    if named is not None and named != step:
        return f"the folder's name says step {named}, its manifest step {step}"
    return None
