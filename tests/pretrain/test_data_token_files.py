"""Token files: the format to the byte, Megatron's reader as a witness, and every kind of damage."""

import hashlib
import importlib
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest

from rondo.pretrain.data.errors import DataError
from rondo.pretrain.data.token_files import TokenFile, open_split

GOLDEN = "033bf421d8eca46acec3bceb2ef618f1e52bd57336fc279bab6f0b9b463fa9e6"
DTYPES = [np.uint8, np.int8, np.int16, np.int32, np.int64, np.uint16]


@pytest.fixture(scope="module")
def megatron():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module("megatron.core.datasets.indexed_dataset")


def write(megatron, prefix: Path, documents, dtype=np.uint16) -> Path:
    """`documents` is a list of documents, each a list of sequences."""
    builder = megatron.IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for sequences in documents:
        builder.add_document(np.concatenate(sequences), [len(s) for s in sequences])
    builder.finalize(f"{prefix}.idx")
    return prefix


@pytest.fixture
def golden(megatron, tmp_path):
    ids = np.arange(12)
    return write(megatron, tmp_path / "train", [[ids[:5], ids[5:8]], [ids[8:]]])


def test_golden_index(golden):
    index = golden.with_suffix(".idx").read_bytes()
    assert len(index) == 94
    assert hashlib.sha256(index).hexdigest() == GOLDEN
    assert golden.with_suffix(".bin").stat().st_size == 24
    file = TokenFile(golden)
    assert len(file) == 2
    assert file.num_tokens == 12
    assert file.starts.tolist() == [0, 8, 12]
    assert file[0].tolist() == list(range(8))
    assert file[1].tolist() == [8, 9, 10, 11]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.__name__)
def test_round_trip_of_every_dtype_as_megatron_reads_it(megatron, tmp_path, dtype):
    rng = np.random.default_rng(0)
    top = min(np.iinfo(dtype).max, 2**31)
    documents = [[rng.integers(0, top, n)] for n in rng.integers(1, 50, 30)]
    prefix = write(megatron, tmp_path / "x", documents, dtype)
    file = TokenFile(prefix)
    theirs = megatron.IndexedDataset(str(prefix))
    assert file.tokens.dtype == dtype
    assert len(file) == len(theirs) == 30
    for i, (document,) in enumerate(documents):
        np.testing.assert_array_equal(file[i], document)
        np.testing.assert_array_equal(file[i], theirs[i])


def test_no_documents(megatron, tmp_path):
    file = TokenFile(write(megatron, tmp_path / "none", []))
    assert (len(file), file.num_tokens) == (0, 0)
    assert file.counts(4).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
@pytest.mark.parametrize("change", [-1, -5, 1])
def test_wrong_sizes_are_named_with_both_numbers(golden, suffix, change):
    path = golden.with_suffix(suffix)
    content = path.read_bytes()
    path.write_bytes(content[:change] if change < 0 else content + b"\0")
    with pytest.raises(DataError) as caught:
        TokenFile(golden)
    for part in (str(path), f"{len(content) + change} bytes", f"expected {len(content)}"):
        assert part in str(caught.value)


@pytest.mark.parametrize("size", [0, 1, 33])
def test_index_without_a_header(golden, size):
    path = golden.with_suffix(".idx")
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(DataError, match=f"{size} bytes, expected at least 34"):
        TokenFile(golden)


@pytest.mark.parametrize(
    ("offset", "content", "message"),
    [
        (0, b"NOTANINDX", "not a token index"),
        (0, b"TNTIDX", "old TNTIDX format"),
        (9, struct.pack("<Q", 2), "version 2, expected 1"),
        (17, b"\x06", "type code 6 is floating point"),
        (17, b"\x07", "type code 7 is floating point"),
        (17, b"\x09", "type code 9 is unknown"),
        (17, b"\x04", "24 bytes, expected 48|do not follow"),
        (18, struct.pack("<Q", 10**12), "expected 12000000000058"),
        (26, struct.pack("<Q", 0), "bytes, expected"),
        (34, struct.pack("<i", -5), "do not follow from its lengths"),
        (46, struct.pack("<q", 8), "do not follow from its lengths"),
        (70, struct.pack("<q", 1), "document indices do not rise"),
        (86, struct.pack("<q", 2), "document indices do not rise"),
        (78, struct.pack("<q", 9), "document indices do not rise"),
    ],
)
def test_damaged_index(golden, offset, content, message):
    path = golden.with_suffix(".idx")
    index = bytearray(path.read_bytes())
    index[offset : offset + len(content)] = content
    path.write_bytes(index)
    with pytest.raises(DataError, match=message) as caught:
        TokenFile(golden)
    assert str(path) in str(caught.value)


def test_missing_files(golden, tmp_path):
    golden.with_suffix(".bin").unlink()
    with pytest.raises(DataError, match=r"train\.bin: cannot be read: No such file"):
        TokenFile(golden)
    with pytest.raises(DataError, match=r"no validation\.idx"):
        open_split(tmp_path, "validation", 12)


def test_ids_beyond_the_vocabulary_are_found_without_a_card(golden, tmp_path):
    assert open_split(tmp_path, "train", 12).num_tokens == 12
    with pytest.raises(DataError, match="token id 11 is outside the vocabulary of 11"):
        open_split(tmp_path, "train", 11)


def test_negative_ids_are_found(megatron, tmp_path):
    write(megatron, tmp_path / "train", [[np.array([3, -2])]], np.int32)
    with pytest.raises(DataError, match="token id -2 is outside"):
        open_split(tmp_path, "train", 12)


def test_counts(megatron, tmp_path):
    file = TokenFile(write(megatron, tmp_path / "x", [[np.array([1, 1, 3])], [np.array([1])]]))
    assert file.counts(5).tolist() == [0, 3, 0, 1, 0]
