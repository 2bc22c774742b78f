"""What `rondo prepare` writes is what Megatron's own GPTDataset trains on, and the other way."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from rondo.pretrain.data import PrepareConfig, load_tokenizer, prepare
from rondo.pretrain.data.token_files import TokenFile, open_split

LENGTH = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("megatron")
    lines = [json.dumps({"text": f"line {i} of {i * i} words"}) for i in range(40)]
    (path / "text.jsonl").write_text("\n".join(lines))
    return prepare(
        PrepareConfig(
            input=str(path / "text.jsonl"),
            output=str(path / "tokens"),
            workers=0,
            validation_fraction=0.2,
        )
    )


def test_gpt_dataset_reads_what_prepare_writes(folder: Path, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
        from megatron.core.datasets.indexed_dataset import IndexedDataset
        from megatron.core.datasets.utils import Split
    ours, prefix = load_tokenizer(folder), str(folder / "train")
    tokenizer = SimpleNamespace(
        vocab_size=ours.vocab_size,
        eod=ours.eod,
        pad=-1,
        special_tokens_dict={},
        unique_identifiers={"class": "bytes"},
    )
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=LENGTH,
        blend=([prefix], None),
        split="1,0,0",
        tokenizer=tokenizer,
        path_to_cache=str(tmp_path),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
    )
    theirs = IndexedDataset(prefix)
    documents = np.arange(len(theirs.sequence_lengths), dtype=np.int32)
    dataset = GPTDataset(theirs, prefix, documents, None, Split.train, config)
    file = TokenFile(folder / "train")
    # One epoch: all our documents, end-of-document ids included, in the order that they chose.
    stream = np.concatenate([file[document] for document in dataset.document_index])
    assert sorted(dataset.document_index) == list(range(len(file)))
    assert len(dataset) == (len(stream) - 1) // LENGTH > 10
    for sample, place in enumerate(dataset.shuffle_index):
        start = int(place) * LENGTH
        found = dataset[sample]
        assert found["tokens"].tolist() == stream[start : start + LENGTH].tolist()
        assert found["labels"].tolist() == stream[start + 1 : start + LENGTH + 1].tolist()


def test_token_files_of_megatron_are_a_folder_to_train_on(folder: Path, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
    ours = load_tokenizer(folder)
    dtype = DType.optimal_dtype(ours.vocab_size)
    builder = IndexedDatasetBuilder(str(tmp_path / "train.bin"), dtype=dtype)
    file = TokenFile(folder / "train")
    for number in range(len(file)):
        builder.add_document(file[number], [len(file[number])])
    builder.finalize(str(tmp_path / "train.idx"))
    # As their preprocessing writes them: the same bytes, and readable without a card.
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"train{suffix}").read_bytes() == (
            folder / f"train{suffix}"
        ).read_bytes()
    opened = open_split(tmp_path, "train", ours.vocab_size)
    assert opened.num_tokens == file.num_tokens
