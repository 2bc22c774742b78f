"""Held-out text of a streamed source, as token files."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import shutil
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track

from rondo.pretrain.data.folders import build_lock, publish
from rondo.pretrain.data.merge import megatron_writer
from rondo.pretrain.data.row_sources import RowSource, row_text
from rondo.pretrain.data.shards import held_out, to_utf8
from rondo.pretrain.data.tokenizer import Tokenizer

SCANNED_ROWS = 20_000
"""Of a dataset, the first ones, in which held-out documents are looked for."""


def held_out_folder(rows: RowSource, tokenizer: Tokenizer, fraction: float, parent: Path) -> Path:
    """A folder with the held-out documents (`shards.held_out`) among a dataset's first rows as
    `validation.bin/.idx`; made if it is not there, by one process. Without any, it has no files of
    tokens."""
    facts = [rows.identity, tokenizer.fingerprint(), fraction, SCANNED_ROWS]
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(rows.name).name).strip("-.") or "source"
    output = parent.expanduser() / f"{name[:64]}-held-out-{digest}"
    if output.is_dir():
        return output
    with build_lock(output) as scratch:
        if output.is_dir():  # by the process that held the lock before
            shutil.rmtree(scratch)
            return output
        finished = scratch / "out"
        shutil.rmtree(finished, ignore_errors=True)
        finished.mkdir()
        try:
            _write(rows, tokenizer, fraction, finished)
            publish(finished, output, scratch)
        except BaseException:
            shutil.rmtree(scratch, ignore_errors=True)
            raise
    return output


def _write(rows: RowSource, tokenizer: Tokenizer, fraction: float, folder: Path) -> None:
    tokenizer.save(folder)
    indexed = megatron_writer()
    dtype = indexed.DType.optimal_dtype(tokenizer.vocab_size)
    builder = indexed.IndexedDatasetBuilder(str(folder / "validation.bin"), dtype=dtype)
    first = itertools.islice(rows.open(), SCANNED_ROWS if fraction else 0)
    console = Console(stderr=True)
    named = f"held-out rows of {rows.name}"
    found = 0
    for row in track(
        first, named, SCANNED_ROWS, console=console, transient=True, disable=not console.is_terminal
    ):
        document = to_utf8(row_text(rows, row))
        if document and held_out(document, fraction):
            ids = np.array([*tokenizer.encode(document.decode()), tokenizer.eod], np.int64)
            builder.add_document(ids, [len(ids)])
            found += 1
    builder.finalize(str(folder / "validation.idx"))
    if not found:
        (folder / "validation.idx").unlink()
        (folder / "validation.bin").unlink()
