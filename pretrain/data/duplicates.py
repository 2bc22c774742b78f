"""Exact duplicates among documents, by 128-bit hashes of their text.

Memory is 24 bytes a document (its hash and its length), and as much again while they are sorted.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from rondo.pretrain.data.errors import DataError

DUPLICATES = "duplicates.json"
"""Where a prepared folder keeps its `duplicate_report`."""


def first_copies(hashes: np.ndarray) -> np.ndarray:
    """Which documents `(D,)` have no equal before them; `hashes` `(D, 2)`."""
    order, starts = _groups(hashes)
    first = np.zeros(len(hashes), bool)
    first[order[starts]] = True  # lexsort is stable: a group begins with its earliest
    return first


def duplicate_report(hashes: np.ndarray, lengths: np.ndarray) -> dict[str, Any]:
    """What a corpus holds more than once.

    Args:
        hashes: `(D, 2)`, of the documents' texts.
        lengths: `(D,)`, their tokens.

    Returns:
        JSON: `documents` and `tokens` of the corpus; those of copies beyond the first
        (`duplicate_documents`, `duplicate_tokens`, and `duplicate_share` of the tokens); and
        `multiplicities`, by how often a text occurs: different texts, and the share of all tokens
        that their copies are.
    """
    order, starts = _groups(hashes)
    times = np.diff(np.append(starts, len(hashes)))
    tokens = lengths[order[starts]].astype(np.int64)
    total = int(lengths.sum())
    copies = int(((times - 1) * tokens).sum())
    return {
        "documents": len(hashes),
        "tokens": total,
        "duplicate_documents": int((times - 1).sum()),
        "duplicate_tokens": copies,
        "duplicate_share": copies / max(1, total),
        "multiplicities": {
            str(n): {
                "texts": int((times == n).sum()),
                "token_share": int(n * tokens[times == n].sum()) / max(1, total),
            }
            for n in np.unique(times).tolist()
        },
    }


def read_multiplicities(folder: Path) -> dict[int, float]:
    """Of a prepared folder, by how often a text occurs (more than once): the share of all tokens
    that its copies are. Empty where copies were dropped, or nobody has counted them.

    Raises DataError when the report cannot be read.
    """
    path = folder / DUPLICATES
    if not path.is_file():
        return {}
    try:
        report = json.loads(path.read_text("utf-8"))
        found = {int(n): float(of["token_share"]) for n, of in report["multiplicities"].items()}
        return {} if report["dropped"] else {n: share for n, share in found.items() if n > 1}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: cannot be read ({error}); prepare the folder again") from error


def _groups(hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The order that puts equal documents side by side, earliest first, and where groups start."""
    order = np.lexsort((hashes[:, 1], hashes[:, 0]))
    ordered = hashes[order]
    new = np.ones(len(hashes), bool)
    new[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    return order, np.flatnonzero(new)
