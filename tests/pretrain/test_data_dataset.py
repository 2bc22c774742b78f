"""Samples: pure functions of their index that cover every document once an epoch."""

import json
import random
import threading
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from rondo.pretrain.data import (
    DataError,
    PrepareConfig,
    Sources,
    TokenDataset,
    bits_per_byte,
    count_bytes,
    load_tokenizer,
    open_dataset,
    prefetch,
    prepare,
    rank_indices,
    unigram_bits_per_byte,
)
from rondo.pretrain.data import packing as packing_module
from rondo.pretrain.data.packing import Stream
from rondo.pretrain.data.token_files import TokenFile
from rondo.pretrain.recipe import DataConfig, SourceConfig

EOD = 256


def make(folder: Path, name: str, texts: list[str], fraction: float = 0.0) -> Path:
    source = folder / f"{name}.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    config = PrepareConfig(str(source), str(folder / name), workers=0, validation_fraction=fraction)
    return prepare(config, quiet=True)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two sources whose documents tell which source and document they are."""
    root = tmp_path_factory.mktemp("data")
    upper = [f"A{i:03d}" + "x" * (i * 7 % 40) for i in range(300)]
    lower = [f"b{i:03d}" + "y" * (i * 5 % 90) for i in range(50)]
    return [make(root, "upper", upper, 0.1), make(root, "lower", lower, 0.1)]


def sources(folders, weights=(3.0, 1.0)) -> Sources:
    return Sources(list(folders), list(weights), load_tokenizer("bytes"))


def dataset(folders, length=32, seed=0, split="train", weights=(3.0, 1.0), vocab_size=None):
    return TokenDataset(sources(folders, weights), length, seed, split, vocab_size)


def equal(a, b) -> bool:
    fields = ("tokens", "targets", "segment_ids")
    return a.source == b.source and all(
        np.array_equal(getattr(a, f), getattr(b, f)) for f in fields
    )


@pytest.mark.parametrize("split", ["train", "validation"])
def test_samples_are_pure_functions_of_their_index(folders, split):
    first = dataset(folders, split=split)
    straight = [first.sample(i) for i in range(300)]
    again = dataset(folders, split=split)
    for i in np.random.default_rng(1).permutation(300):
        assert equal(again.sample(int(i)), straight[i])
    assert equal(dataset(folders, split=split).sample(299), straight[299])


def test_shapes_and_types(folders):
    sample = dataset(folders).sample(5)
    assert (sample.tokens.dtype, sample.tokens.shape) == (np.int64, (33,))
    assert (sample.targets.dtype, sample.targets.shape) == (np.int64, (32,))
    assert (sample.segment_ids.dtype, sample.segment_ids.shape) == (np.int32, (32,))
    batch = dataset(folders).batch([5, 6, 7])
    assert batch.tokens.shape == batch.targets.shape == batch.segment_ids.shape == (3, 32)
    assert batch.tokens.dtype == batch.targets.dtype == torch.int64
    assert batch.segment_ids.dtype == torch.int32
    np.testing.assert_array_equal(batch.tokens[0], sample.tokens[:-1])
    np.testing.assert_array_equal(batch.targets[0], sample.targets)


def test_seeds_and_splits_differ(folders):
    base = dataset(folders)
    for other in (dataset(folders, seed=1), dataset(folders, split="validation")):
        assert not equal(base.sample(0), other.sample(0))
        assert base.fingerprint() != other.fingerprint()


def test_borders(folders):
    data = dataset(folders)
    borders = 0
    for i in range(100):
        sample = data.sample(i)
        after_end = np.concatenate([[0], np.cumsum(sample.tokens[:-1] == EOD)])
        np.testing.assert_array_equal(sample.segment_ids, after_end[:-1])
        ends = sample.tokens[:-1] == EOD
        assert (sample.targets[ends] == -100).all()
        np.testing.assert_array_equal(sample.targets[~ends], sample.tokens[1:][~ends])
        borders += int(ends.sum()) + int(sample.tokens[-1] == EOD)
    assert borders > 50


def stream_of(data: TokenDataset, source: int, count: int) -> tuple[np.ndarray, list]:
    """The source's token stream as its samples give it, and those samples."""
    samples = [s for s in map(data.sample, range(count)) if s.source == source]
    for before, after in pairwise(samples):
        assert before.tokens[-1] == after.tokens[0]  # neighbours share one token
    return np.concatenate([s.tokens[:-1] for s in samples]), samples


def documents_of(stream: np.ndarray) -> list[bytes]:
    parts = np.split(stream, np.flatnonzero(stream == EOD) + 1)
    return [bytes(part[:-1].tolist()) for part in parts[:-1]]


@pytest.mark.parametrize("source", [0, 1])
def test_each_document_once_an_epoch(folders, source, monkeypatch):
    monkeypatch.setattr(packing_module, "BLOCK", 16)
    file = TokenFile(folders[source] / "train")
    everything = Counter(bytes(file[i][:-1].tolist()) for i in range(len(file)))
    stream, _ = stream_of(dataset(folders, length=31), source, 2500)
    found = documents_of(stream)
    epochs = [found[n : n + len(file)] for n in range(0, len(found), len(file))]
    assert len(epochs) > 3
    for epoch in epochs[:-1]:
        assert Counter(epoch) == everything
    assert epochs[0] != epochs[1]
    assert epochs[1] != epochs[2]


def test_validation_keeps_the_order_of_the_file(folders):
    file = TokenFile(folders[0] / "validation")
    stream, _ = stream_of(dataset(folders, split="validation"), 0, 200)
    np.testing.assert_array_equal(stream[: file.num_tokens], file.tokens)
    np.testing.assert_array_equal(stream[file.num_tokens :][:50], file.tokens[:50])


def test_a_sample_longer_than_the_source(folders):
    file = TokenFile(folders[1] / "validation")
    length = 3 * file.num_tokens + 5
    window, segments = Stream(file, None).window(2, length)
    np.testing.assert_array_equal(window, np.tile(file.tokens, 5)[2 : 2 + length])
    assert segments[-1] >= 3 * len(file)
    assert (np.diff(segments) >= 0).all()


def test_order_does_not_depend_on_the_block(folders, monkeypatch):
    file = TokenFile(folders[0] / "train")
    windows = []
    for block in (1, 7, 256, 10**6):
        monkeypatch.setattr(packing_module, "BLOCK", block)
        stream = Stream(file, (4, 2))
        windows.append(np.concatenate([stream.window(s, 40)[0] for s in (0, 17, 4000, 99_999)]))
    for window in windows[1:]:
        np.testing.assert_array_equal(window, windows[0])


def test_weights_and_epochs(folders):
    data = dataset(folders, weights=(3.0, 1.0))
    taken = Counter(data.sample(i).source for i in range(400))
    assert taken == {0: 300, 1: 100}
    tokens = [TokenFile(f / "train").num_tokens for f in folders]
    assert data.epochs(400) == {0: 300 * 32 / tokens[0], 1: 100 * 32 / tokens[1]}


def test_fingerprint_covers_what_samples_depend_on(folders):
    base = dataset(folders).fingerprint()
    assert dataset(folders).fingerprint() == base
    assert dataset(folders, weights=(3.0, 2.0)).fingerprint() != base
    assert dataset(folders, length=33).fingerprint() != base
    assert dataset(folders[::-1]).fingerprint() != base
    assert dataset(folders, vocab_size=300).fingerprint() == base


def test_what_cannot_be_opened(folders, tmp_path):
    with pytest.raises(DataError, match=r"data\.sequence_length is 0"):
        dataset(folders, length=0)
    with pytest.raises(DataError, match="split is 'test'"):
        dataset(folders, split="test")
    with pytest.raises(DataError, match="token id 256 is outside the vocabulary of 256"):
        dataset(folders, vocab_size=256)
    bare = make(tmp_path, "bare", ["one", "two"])
    with pytest.raises(DataError, match="no source holds out documents"):
        dataset([bare], split="validation", weights=[1.0])
    mixed = dataset([bare, folders[0]], split="validation", weights=[1.0, 1.0])
    assert {mixed.sample(i).source for i in range(10)} == {1}


def test_ids_are_checked_as_they_are_read(folders):
    data = dataset(folders)
    data.known_ids = 100  # as if a bit had flipped in a file too large to be summed
    with pytest.raises(DataError, match=r"outside the vocabulary of 100 .*model\.vocab_size"):
        data.sample(0)


@pytest.mark.parametrize("world", [1, 2, 3, 4, 6, 12])
@pytest.mark.parametrize("micro", [1, 3, 5, 64])
def test_ranks_share_the_global_batch(world, micro):
    for step in (0, 7):
        ranks = [rank_indices(step, 12, rank, world, micro) for rank in range(world)]
        assert len({tuple(map(len, micros)) for micros in ranks}) == 1
        assert all(len(part) <= micro for micros in ranks for part in micros)
        union = [i for micros in ranks for part in micros for i in part]
        assert union == list(range(step * 12, step * 12 + 12))


def test_batches_that_cannot_be_shared():
    with pytest.raises(DataError, match="global_batch_size is 12; expected a multiple of the 5"):
        rank_indices(0, 12, 0, 5, 1)
    with pytest.raises(DataError, match="expected at least 1"):
        rank_indices(0, 12, 0, 1, 0)


def test_prefetch():
    assert list(prefetch(range(100), depth=3)) == list(range(100))
    assert list(prefetch([])) == []

    def fails():
        yield 1
        raise DataError("broken")

    items = prefetch(fails())
    assert next(items) == 1
    with pytest.raises(DataError, match="broken"):
        next(items)


def test_prefetch_runs_ahead_and_ends_when_closed():
    made = []
    items = prefetch((made.append(i) or i for i in range(1000)), depth=2)
    assert next(items) == 0
    deadline = time.monotonic() + 5
    while len(made) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(made) == 4  # one taken, two waiting, one in hand
    items.close()
    assert not any(thread.name == "prefetch" for thread in threading.enumerate())


def test_unigram_on_a_known_distribution():
    counts = np.array([5.0, 2.0, 0.0, 1.0])  # with add-one: 6, 3, 1, 2 of 12
    lengths = np.array([1, 2, 3, 0])
    targets = [torch.tensor([[0, 1], [-100, 2]]), torch.tensor([3])]
    bits = -sum(np.log2(np.array([6, 3, 1, 2]) / 12))
    assert unigram_bits_per_byte(counts, targets, lengths) == pytest.approx(bits / 6, rel=1e-12)
    assert count_bytes(targets[0], lengths) == 6
    assert bits_per_byte(np.log(2) * 12, 6) == pytest.approx(2)
    with pytest.raises(DataError, match="stand for no text"):
        unigram_bits_per_byte(counts, [torch.tensor([-100])], lengths)


def test_token_counts(folders):
    files = [TokenFile(folder / "train") for folder in folders]
    single = dataset(folders[:1], weights=[1.0]).token_counts()
    np.testing.assert_allclose(single, np.bincount(files[0].tokens, minlength=257))
    mixed = dataset(folders, weights=(3.0, 1.0)).token_counts()
    shares = [np.bincount(f.tokens, minlength=257) / f.num_tokens for f in files]
    np.testing.assert_allclose(mixed / mixed.sum(), 0.75 * shares[0] + 0.25 * shares[1])


@pytest.fixture
def recipe(tmp_path):
    rng = random.Random(0)
    stems = ["".join(rng.choices("abcdefghij", k=rng.randint(2, 8))) for _ in range(300)]
    for name in ("upper", "lower"):
        texts = [" ".join(rng.choices(stems, k=30)) for _ in range(40)]
        rows = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (tmp_path / f"{name}.jsonl").write_text(rows)
    listed = [SourceConfig(str(tmp_path / f"{name}.jsonl")) for name in ("upper", "lower")]
    return DataConfig(sources=listed, folder=str(tmp_path / "cache"), sequence_length=16)


def test_a_source_that_is_not_there_is_named_by_its_key(recipe):
    recipe.sources[1].path = "nowhere.txt"
    for recipe.tokenizer in ("bytes", "sentencepiece:300"):
        with pytest.raises(DataError, match=r"data\.sources\.1\.path: 'nowhere.txt': no such file"):
            open_dataset(recipe, 0, "train")


def test_open_dataset_prepares_once(recipe, capfd):
    first = open_dataset(recipe, 0, "train")
    assert first.tokenizer.kind == "bytes"
    names = sorted(path.name for path in Path(recipe.folder).iterdir())
    assert [name.rsplit("-", 1)[0] for name in names] == ["lower.jsonl", "upper.jsonl"]
    assert capfd.readouterr().err.count("prepared") == 2
    assert open_dataset(recipe, 0, "train").fingerprint() == first.fingerprint()
    assert capfd.readouterr().err == ""
    recipe.validation_fraction = 0.3
    assert open_dataset(recipe, 0, "train").fingerprint() != first.fingerprint()
    assert len(list(Path(recipe.folder).iterdir())) == 4


def test_open_dataset_trains_one_tokenizer_for_all_sources(recipe, capfd):
    recipe.tokenizer = "sentencepiece:350"
    data = open_dataset(recipe, 0, "train")
    assert (data.tokenizer.kind, data.vocab_size) == ("sentencepiece", 350)
    names = [path.name for path in Path(recipe.folder).iterdir()]
    assert sum(name.startswith("tokenizer-350-") for name in names) == 1
    assert len(names) == 3
    assert data.batch([0, 1]).tokens.max() < 350
    before = open_dataset(recipe, 0, "train").fingerprint()
    recipe.sources[0].weight = 9.0
    assert open_dataset(recipe, 0, "train").fingerprint() != before
    assert len(list(Path(recipe.folder).glob("tokenizer-350-*"))) == 2  # weights count in training


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        ("sentencepiece:abc", "'sentencepiece:abc': expected sentencepiece:N"),
        ("nowhere/tokenizer.json", "nowhere/tokenizer.json: no such tokenizer file"),
        ("sentencepiece:90000", "'sentencepiece:90000' cannot be trained: .*too high"),
        ("byte", "unknown tokenizer 'byte'"),
    ],
)
def test_what_is_wrong_with_a_tokenizer_names_its_key(recipe, tokenizer, message):
    recipe.tokenizer = tokenizer
    with pytest.raises(DataError, match=f"^data.tokenizer: {message}"):
        open_dataset(recipe, 0, "train")


def test_prepared_folders_bring_their_tokenizer(folders, recipe, tmp_path):
    recipe.sources = [SourceConfig(str(folders[0])), *recipe.sources]
    assert open_dataset(recipe, 0, "train").tokenizer.kind == "bytes"
    recipe.tokenizer = "sentencepiece:350"
    with pytest.raises(DataError, match="is already tokenised; expected 'auto'"):
        open_dataset(recipe, 0, "train")
    other = PrepareConfig(
        str(tmp_path / "lower.jsonl"), str(tmp_path / "sp"), "sentencepiece:350", workers=0
    )
    recipe.tokenizer = str(prepare(other))
    with pytest.raises(DataError, match=r"another tokenizer \(bytes, 257 ids\)"):
        open_dataset(recipe, 0, "train")
    recipe.sources = []
    with pytest.raises(DataError, match=r"data\.sources is empty"):
        open_dataset(recipe, 0, "train")
