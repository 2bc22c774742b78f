"""Text to token files, and token files to batches."""

from rondo.pretrain.data.curriculum import Curriculum
from rondo.pretrain.data.dataset import (
    Batch,
    Sample,
    Sources,
    Split,
    TokenDataset,
    prefetch,
    rank_indices,
)
from rondo.pretrain.data.errors import DataError
from rondo.pretrain.data.prepare import PrepareConfig, prepare
from rondo.pretrain.data.seen import Seen, read_seen
from rondo.pretrain.data.sources import open_dataset, prepare_sources
from rondo.pretrain.data.tokenizer import Tokenizer, load_tokenizer
from rondo.pretrain.data.unigram import bits_per_byte, count_bytes, unigram_bits_per_byte

__all__ = [
    "Batch",
    "Curriculum",
    "DataError",
    "PrepareConfig",
    "Sample",
    "Seen",
    "Sources",
    "Split",
    "TokenDataset",
    "Tokenizer",
    "bits_per_byte",
    "count_bytes",
    "load_tokenizer",
    "open_dataset",
    "prefetch",
    "prepare",
    "prepare_sources",
    "rank_indices",
    "read_seen",
    "unigram_bits_per_byte",
]
