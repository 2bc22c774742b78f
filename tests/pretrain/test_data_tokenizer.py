"""Tokenizers give text back as it was, weigh it in bytes, and refuse files that are none."""

import json
import random

import numpy as np
import pytest

from rondo.pretrain.data.errors import DataError
from rondo.pretrain.data.tokenizer import MAX_FILE_BYTES, ByteTokenizer, load_tokenizer
from rondo.pretrain.data.train_tokenizer import parse_pieces, sample, train_sentencepiece

JUNK = [
    "",
    " ",
    "  leading and trailing  ",
    "a\n\n\tb\r\nc\rd\n",
    "NUL \0 inside",
    "\u2581 the space's stand-in \u2581\u2581",
    "\u2585 reserved by the trainer",
    "\ufeffbyte order mark",
    "e" + "\u0301" * 1000,
    "\u202eright to left\u202c",
    "👩‍👩‍👧‍👦🏳️‍🌈",
    "<|endoftext|> </s> <unk> <0x0A>",
    "\ufffd\U0010ffff\u2028\u0085",
    "日本語 текст ελληνικά",
    "x" * 100_000,
]


def words(count: int) -> list[str]:
    rng = random.Random(0)
    stems = ["".join(rng.choices("abcdefgh", k=rng.randint(2, 7))) for _ in range(400)]
    return [" ".join(rng.choices(stems, k=60)) + ".\n" for _ in range(count)]


@pytest.fixture(scope="module")
def sentencepiece():
    return train_sentencepiece(words(300) + JUNK, 500)


@pytest.fixture(scope="module")
def huggingface(tmp_path_factory):
    return load_tokenizer(huggingface_file(tmp_path_factory.mktemp("hf") / "tokenizer.json"))


def huggingface_file(path, end="<|endoftext|>"):
    """A byte-level BPE with truncation switched on, as some published files have it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    fast = Tokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[end],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    fast.train_from_iterator(words(50), trainer)
    fast.enable_truncation(16)
    fast.save(str(path))
    return path


@pytest.fixture(params=["bytes", "sentencepiece", "huggingface"])
def tokenizer(request):
    return ByteTokenizer() if request.param == "bytes" else request.getfixturevalue(request.param)


@pytest.mark.parametrize("text", JUNK, ids=lambda t: ascii(t[:12]))
def test_round_trip_and_byte_lengths(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.eod not in ids
    assert all(0 <= i < tokenizer.vocab_size for i in ids)
    assert tokenizer.decode([tokenizer.eod, *ids, tokenizer.eod]) == text
    assert tokenizer.byte_lengths()[np.array(ids, int)].sum() == len(text.encode())


def test_lone_surrogates_do_not_crash(tokenizer):
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a?b"


def test_vocabulary(tokenizer):
    lengths = tokenizer.byte_lengths()
    assert lengths.shape == (tokenizer.vocab_size,)
    assert lengths[tokenizer.eod] == 0


def test_save_and_load(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.kind == tokenizer.kind
    assert again.fingerprint() == tokenizer.fingerprint()
    assert again.encode("abc dé") == tokenizer.encode("abc dé")
    (file,) = tmp_path.iterdir()
    assert load_tokenizer(str(file)).fingerprint() == tokenizer.fingerprint()


def test_pieces_are_learnt(sentencepiece):
    text = "".join(words(300))
    assert len(sentencepiece.encode(text)) < 0.6 * len(text)


def test_training_is_deterministic(sentencepiece):
    again = train_sentencepiece(words(300) + JUNK, 500)
    assert again.fingerprint() == sentencepiece.fingerprint()
    assert train_sentencepiece(words(299), 500).fingerprint() != sentencepiece.fingerprint()


def test_sample_is_bounded_and_ignores_order():
    texts = words(200)
    some = sample(texts, 5000)
    assert 5000 <= sum(map(len, some)) < 5000 + 2000
    assert sample(texts[::-1], 5000) == some
    assert sorted(sample(texts, 10**9)) == sorted(texts)
    long = "".join(f"line {i}\n" for i in range(10_000))
    pieces = sample([long], 10**9)
    assert max(map(len, pieces)) <= 2000
    assert all(piece.endswith("\n") for piece in pieces)
    assert sum(map(len, pieces)) == len(long)


@pytest.mark.parametrize("kind", [".model", ".json"])
@pytest.mark.parametrize("content", [b"", b"garbage" * 50, random.Random(1).randbytes(20_000)])
def test_files_that_are_no_tokenizer(tmp_path, kind, content):
    path = tmp_path / f"tokenizer{kind}"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        load_tokenizer(str(path))
    assert str(path) in str(caught.value)


def test_truncated_model(sentencepiece, tmp_path):
    sentencepiece.save(tmp_path)
    path = tmp_path / "tokenizer.model"
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(DataError, match="not a sentencepiece model"):
        load_tokenizer(path)


def test_oversized_file_is_not_read(tmp_path):
    path = tmp_path / "tokenizer.json"
    with open(path, "wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)  # sparse: takes no disk
    with pytest.raises(DataError, match="cannot be a tokenizer"):
        load_tokenizer(path)


def test_missing_end_of_document(tmp_path):
    with pytest.raises(DataError, match="no token to end documents"):
        load_tokenizer(huggingface_file(tmp_path / "tokenizer.json", end="[MASK]"))
    vocabulary = tmp_path / "plain.json"
    vocabulary.write_text(json.dumps({"hello": 1}))
    with pytest.raises(DataError, match=r"not a Hugging Face tokenizer\.json"):
        load_tokenizer(vocabulary)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("byte", "did you mean 'bytes'"),
        ("sentencepice:5", "did you mean 'sentencepiece:N'"),
        ("nowhere/tokenizer.json", "no such tokenizer file"),
        ("", "no tokenizer in this folder|unknown tokenizer"),
    ],
)
def test_unknown_specs(spec, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=message):
        load_tokenizer(spec)


def test_piece_counts():
    assert parse_pieces("bytes") is None
    assert parse_pieces("sentencepiece:4096") == 4096
    for wrong in ("sentencepiece:", "sentencepiece:12", "sentencepiece:-400", "sentencepiece:1e4"):
        with pytest.raises(DataError, match="expected sentencepiece:N"):
            parse_pieces(wrong)
    with pytest.raises(DataError, match=r"cannot be trained: .*too high \(8000\)"):
        train_sentencepiece(words(5), 8000)
    with pytest.raises(DataError, match="the sample has no text"):
        train_sentencepiece([], 500)
