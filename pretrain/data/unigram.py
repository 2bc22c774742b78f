"""The simplest language model, as a yardstick: every token drawn by its frequency."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import torch

from rondo.pretrain.data.errors import DataError


def count_bytes(targets: torch.Tensor, byte_lengths: np.ndarray) -> int:
    """Bytes of text that the valid (non-negative) `targets` stand for."""
    ids = targets.reshape(-1).numpy()
    return int(byte_lengths[ids[ids >= 0]].sum())


def bits_per_byte(nats: float, num_bytes: int) -> float:
    """Bits per byte of a summed cross-entropy, end-of-document targets included in the sum; not a
    number where there was no text."""
    if num_bytes == 0:
        return math.nan
    return nats / (math.log(2) * num_bytes)


def unigram_bits_per_byte(
    counts: np.ndarray, targets: Iterable[torch.Tensor], byte_lengths: np.ndarray
) -> float:
    """Bits per byte of a token-unigram model on validation targets.

    p(id) = (count + 1) / (sum of counts + vocabulary), from training counts `(vocab,)`
    (`TokenDataset.token_counts`), add-one smoothed. `targets` are tensors of ids of any shape,
    negative ones ignored; `byte_lengths` is the tokenizer's.

    Raises DataError when there is no valid target.
    """
    smoothed = counts + 1.0
    surprise = -np.log(smoothed / smoothed.sum())
    nats, num_bytes = 0.0, 0
    for tensor in targets:
        ids = tensor.reshape(-1).numpy()
        nats += float(surprise[ids[ids >= 0]].sum())
        num_bytes += count_bytes(tensor, byte_lengths)
    if num_bytes == 0:
        raise DataError("the validation targets stand for no text")
    return bits_per_byte(nats, num_bytes)
