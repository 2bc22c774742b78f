"""Exact duplicates among documents, by 128-bit hashes of their text.

Memory is 24 bytes a document (its hash and its length), and as much again while they are sorted.
"""

from __future__ import annotations

from typing import Any

import numpy as np


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


def _groups(hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The order that puts equal documents side by side, earliest first, and where groups start."""
    order = np.lexsort((hashes[:, 1], hashes[:, 0]))
    ordered = hashes[order]
    new = np.ones(len(hashes), bool)
    new[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    return order, np.flatnonzero(new)
