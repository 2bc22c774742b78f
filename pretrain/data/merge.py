"""From shards to the token files of both splits."""

from __future__ import annotations

import importlib
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from rondo.pretrain.data.duplicates import DUPLICATES, duplicate_report, first_copies
from rondo.pretrain.data.shards import Shard
from rondo.pretrain.data.tokenizer import Tokenizer

SPLITS = ("train", "validation")
LOSS = ".loss.bin"
"""Ends the name of a split's loss mask: a byte a token, 1 where the loss is on it."""


def _held_out(hashes: np.ndarray, fraction: float) -> np.ndarray:
    """Which documents `(D,)` are for validation, by their hashes `(D, 2)` alone.

    Both sides get at least one document when there are two and `fraction` is not 0.
    """
    chosen = hashes[:, 0] < np.uint64(int(fraction * 2**64))
    if len(hashes) == 1:  # there has to be something to train on
        chosen[:] = False
    elif fraction:
        if not chosen.any():
            chosen[np.argmin(hashes[:, 0])] = True
        if chosen.all():
            chosen[np.argmax(hashes[:, 0])] = False
    return chosen


def merge(
    paths: list[Path], fraction: float, tokenizer: Tokenizer, out: Path, *, unique: bool = False
) -> dict[str, Any]:
    """Write both splits' token files and `duplicates.json` from the shards; returns their part of
    the card. `unique` leaves out documents whose text came before."""
    indexed = megatron_writer()
    hashes = np.concatenate([Shard.read_hashes(path) for path in paths])
    lengths = np.concatenate([Shard.read_lengths(path) for path in paths])
    report = {**duplicate_report(hashes, lengths), "dropped": unique}
    (out / DUPLICATES).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    keep = first_copies(hashes) if unique else np.ones(len(hashes), bool)
    chosen = np.zeros(len(hashes), bool)
    chosen[keep] = _held_out(hashes[keep], fraction)
    dtype = indexed.DType.optimal_dtype(tokenizer.vocab_size)
    builders = [indexed.IndexedDatasetBuilder(str(out / f"{s}.bin"), dtype=dtype) for s in SPLITS]
    counts = [{"documents": 0, "tokens": 0, "bytes": 0, "max_token": -1} for _ in SPLITS]
    position = replaced = 0
    for path in paths:
        shard = Shard.read(path)
        replaced += int(shard.replaced)
        borders = np.cumsum(shard.lengths)[:-1]
        documents = np.split(shard.tokens, borders)
        scored = np.split(shard.scored, borders) if len(shard.scored) else documents
        masks: list[list[np.ndarray]] = [[] for _ in SPLITS]
        for document, learnt, text_bytes in zip(documents, scored, shard.text_bytes, strict=True):
            side, kept = int(chosen[position]), keep[position]
            position += 1
            if not kept:
                continue
            builders[side].add_document(document, [len(document)])
            masks[side].append(learnt)
            count = counts[side]
            count["documents"] += 1
            count["tokens"] += len(document)
            count["bytes"] += int(text_bytes)
            count["max_token"] = max(count["max_token"], int(document.max()))
        for split, mask in zip(SPLITS, masks, strict=True):
            if len(shard.scored) and mask:
                with (out / f"{split}{LOSS}").open("ab") as file:
                    np.concatenate(mask).tofile(file)
    for split, builder in zip(SPLITS, builders, strict=True):
        builder.finalize(str(out / f"{split}.idx"))
    return {
        "tokenizer": {
            "kind": tokenizer.kind,
            "vocab_size": tokenizer.vocab_size,
            "eod": tokenizer.eod,
            "fingerprint": tokenizer.fingerprint(),
        },
        "dtype": np.dtype(dtype).name,
        "splits": dict(zip(SPLITS, counts, strict=True)),
        "duplicate_documents": report["duplicate_documents"],
        "duplicate_share": report["duplicate_share"],
        "replacement_characters": replaced,
    }


def megatron_writer() -> Any:
    """Megatron-Core's writer. Importing it takes seconds and warns of what it does without."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module("megatron.core.datasets.indexed_dataset")
