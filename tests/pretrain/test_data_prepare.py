"""`prepare`: what it writes, that it writes the same whatever happens, and that it writes all or
nothing."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow
import pyarrow.parquet
import pytest

from rondo.pretrain.data import PrepareConfig, load_tokenizer, prepare, shards
from rondo.pretrain.data.errors import DataError
from rondo.pretrain.data.folders import build_lock, sha256_file
from rondo.pretrain.data.merge import _held_out
from rondo.pretrain.data.token_files import TokenFile, open_split
from rondo.tests.forks import FORKS, Fork, environment

COUNT = 60
RNG = random.Random(0)
STEMS = ["".join(RNG.choices("abcdefghij", k=RNG.randint(2, 8))) for _ in range(300)]
TEXTS = [f"document {i}: {' '.join(RNG.choices(STEMS, k=5 + i))}, é\n" for i in range(COUNT)]
EVERYTHING = {"card.json", "train.bin", "train.idx", "validation.bin", "validation.idx"}
EVERYTHING |= {"duplicates.json"}


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "source.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


def config(source, output, **options) -> PrepareConfig:
    options = {"workers": 0, "validation_fraction": 0.2} | options
    return PrepareConfig(input=str(source), output=str(output), **options)


def decoded(folder: Path, split: str) -> list[str]:
    tokenizer = load_tokenizer(folder)
    file = TokenFile(folder / split)
    assert all(file[i][-1] == tokenizer.eod for i in range(len(file)))
    return [tokenizer.decode(file[i].tolist()) for i in range(len(file))]


def card(folder: Path) -> dict:
    return json.loads((folder / "card.json").read_text())


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: sha256_file(path) for path in folder.iterdir()}


def test_contents_and_card(source, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "GROUP_BYTES", 500)
    with open(source, "a") as file:
        for text in (TEXTS[3], TEXTS[3], "", "surrogate \ud800"):
            file.write(json.dumps({"text": text}) + "\n")
    out = prepare(config(source, tmp_path / "out"))
    assert {path.name for path in out.iterdir()} == EVERYTHING | {"tokenizer.bytes"}
    train, held = decoded(out, "train"), decoded(out, "validation")
    expected = [*TEXTS, TEXTS[3], TEXTS[3], "surrogate \ufffd"]
    assert sorted(train + held) == sorted(expected)
    assert [text for text in expected if text in train] == train  # the order is kept
    assert not set(train) & set(held)
    assert 4 <= len(held) <= 24
    facts = card(out)
    assert facts["splits"]["train"] == {
        "documents": len(train),
        "tokens": sum(len(t.encode()) + 1 for t in train),
        "bytes": sum(len(t.encode()) for t in train),
        "max_token": 256,
    }
    assert facts["splits"]["validation"]["documents"] == len(held)
    assert facts["duplicate_documents"] == 2
    assert facts["replacement_characters"] == 1
    assert facts["dtype"] == "uint16"
    assert facts["tokenizer"]["fingerprint"] == load_tokenizer("bytes").fingerprint()
    for name, facts_of_file in facts["files"].items():
        assert facts_of_file["sha256"] == sha256_file(out / name)
        assert facts_of_file["bytes"] == (out / name).stat().st_size
    assert not (tmp_path / "out.building").exists()


def test_text_and_parquet_give_the_same_tokens(tmp_path):
    for i, text in enumerate(TEXTS):
        (tmp_path / "texts").mkdir(exist_ok=True)
        (tmp_path / "texts" / f"{i:03d}.txt").write_text(text)
    pyarrow.parquet.write_table(pyarrow.table({"body": TEXTS}), tmp_path / "x.parquet")
    from_text = prepare(config(tmp_path / "texts", tmp_path / "a"))
    rows = prepare(config(tmp_path / "x.parquet", tmp_path / "b", text_field="body"))
    for name in ("train.bin", "train.idx", "validation.bin"):
        assert hashes(from_text)[name] == hashes(rows)[name]


def test_embedded_corpus_with_trained_pieces(tmp_path):
    options = {"tokenizer": "sentencepiece:1000", "tokenizer_sample_mb": 0.1}
    out = prepare(config("stdlib-english", tmp_path / "out", **options))
    assert load_tokenizer(out).vocab_size == 1000
    facts = card(out)["splits"]["train"]
    assert facts["bytes"] > 1e6
    assert facts["tokens"] < 0.6 * facts["bytes"]
    assert any("module" in text for text in decoded(out, "validation"))


def test_two_preparations_are_identical(source, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "GROUP_BYTES", 500)
    # Workers that need not import first; test_workers_end_with_a_killed_parent has spawned ones.
    monkeypatch.setattr(shards.multiprocessing, "get_context", lambda method: FORKS)
    options = {"tokenizer": "sentencepiece:350"}
    first = prepare(config(source, tmp_path / "a", **options))
    second = prepare(config(source, tmp_path / "b", workers=2, **options))
    assert hashes(first) == hashes(second)


def test_a_finished_folder_is_left_alone(source, tmp_path, capfd):
    out = prepare(config(source, tmp_path / "out"))
    printed = capfd.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1  # no bar where there is no terminal
    assert f"prepared {source} -> {out}: " in printed.err
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert prepare(config(source, tmp_path / "out", workers=3)) == out
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before
    assert capfd.readouterr().err == ""
    with pytest.raises(DataError, match=r"holds another preparation .*it differs in seed"):
        prepare(config(source, tmp_path / "out", seed=1))


def prepare_and_die(source, out):
    """With SIGKILL, after four groups."""
    shards.GROUP_BYTES = 500
    write = shards.Shard.write

    def write_and_die(self, path):
        write(self, path)
        if len(list(path.parent.glob("*.npz"))) == 4:
            os.kill(os.getpid(), signal.SIGKILL)

    shards.Shard.write = write_and_die
    prepare(config(source, out))


def test_resume_after_kill(source, tmp_path, monkeypatch):
    out = tmp_path / "out"
    killed = Fork(tmp_path, prepare_and_die, source, out)
    assert killed.end() == -signal.SIGKILL, killed.log.read_text()
    assert not out.exists()
    monkeypatch.setattr(shards, "GROUP_BYTES", 500)
    done = len(list((tmp_path / "out.building").rglob("*.npz")))
    made = []
    tokenize = shards.tokenize
    monkeypatch.setattr(shards, "tokenize", lambda *a: made.append(1) or tokenize(*a))
    prepare(config(source, out))
    resumed = len(made)
    straight = prepare(config(source, tmp_path / "straight"))
    assert done == 4
    assert len(made) - resumed == resumed + done
    assert hashes(out) == hashes(straight)
    assert not (tmp_path / "out.building").exists()


SLOW = """
import sys, time
from rondo.pretrain.data import PrepareConfig, prepare, shards
shards.GROUP_BYTES = 500
if __name__ == "__main__":
    texts = shards.to_utf8
    shards.to_utf8 = lambda text: time.sleep(0.2) or texts(text)
    prepare(PrepareConfig(input=sys.argv[1], output=sys.argv[2], workers=2))
"""


def test_workers_end_with_a_killed_parent(source, tmp_path):
    script = tmp_path / "slow.py"
    script.write_text(SLOW)
    command = [sys.executable, str(script), str(source), str(tmp_path / "out")]
    parent = subprocess.Popen(command, env=environment(), stderr=subprocess.DEVNULL)
    workers = _wait_for(lambda: len(found := psutil.Process(parent.pid).children()) >= 3 and found)
    _wait_for(lambda: any((tmp_path / "out.building").rglob("*.npz")))
    parent.kill()
    parent.wait()
    _, alive = psutil.wait_procs(workers, timeout=10)
    for process in alive:
        process.kill()
    assert not alive


def _wait_for(condition, seconds: float = 120):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.05)
    raise TimeoutError


def test_one_of_several_processes_builds(source, tmp_path):
    logs = [tmp_path / "0.log", tmp_path / "1.log"]
    options = config(source, tmp_path / "out")
    started = [Fork(tmp_path, prepare, options, log=log) for log in logs]
    codes, messages = [each.end() for each in started], [log.read_text() for log in logs]
    assert codes == [0, 0], messages
    assert sum("prepared" in message for message in messages) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"source.jsonl", "out", "0.log", "1.log"}
    assert open_split(tmp_path / "out", "train", 257).num_tokens > 0


def test_a_dead_owner_holds_no_lock(source, tmp_path):
    (tmp_path / "out.building").mkdir()
    (tmp_path / "out.building" / "lock").write_text("")
    prepare(config(source, tmp_path / "out"))
    with build_lock(tmp_path / "other") as scratch:
        assert (scratch / "lock").exists()
    with build_lock(tmp_path / "other"):
        pass


def test_split_by_hash():
    rng = np.random.default_rng(0)
    many = rng.integers(0, 2**64, (20_000, 2), np.uint64)
    assert abs(_held_out(many, 0.1).mean() - 0.1) < 0.01
    order = rng.permutation(len(many))
    np.testing.assert_array_equal(_held_out(many[order], 0.1), _held_out(many, 0.1)[order])
    for fraction in (0.0001, 0.9999):
        assert _held_out(many[:2], fraction).sum() == 1
    assert _held_out(many[:1], 0.5).sum() in (0, 1)
    assert not _held_out(many, 0).any()
    assert _held_out(np.zeros((3, 2), np.uint64), 0.01).sum() == 2


def test_split_depends_on_the_seed_and_not_on_the_order(source, tmp_path):
    turned = tmp_path / "turned.jsonl"
    turned.write_text("".join(reversed(source.read_text().splitlines(keepends=True))))
    held = set(decoded(prepare(config(source, tmp_path / "a")), "validation"))
    assert set(decoded(prepare(config(turned, tmp_path / "b")), "validation")) == held
    assert set(decoded(prepare(config(source, tmp_path / "c", seed=-7)), "validation")) != held


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input": "none/such.txt"}, "no such file"),
        ({"output": ""}, "output is empty"),
        ({"tokenizer": "byte"}, "did you mean 'bytes'"),
        ({"tokenizer": "sentencepiece:9"}, "expected sentencepiece:N"),
        ({"tokenizer": "sentencepiece:90000"}, "cannot be trained: .*too high"),
        ({"validation_fraction": 1.0}, "validation_fraction is 1.0; expected 0 <="),
        ({"validation_fraction": float("nan")}, "validation_fraction is nan"),
        ({"workers": -2}, "workers is -2"),
        ({"document_bytes": -1}, "document_bytes is -1"),
        ({"tokenizer_sample_mb": 0.0}, "tokenizer_sample_mb is 0.0"),
        ({"seed": 2**63}, "seed is 9223372036854775808"),
        ({"text_field": "body"}, r"source\.jsonl:1: no field 'body'"),
    ],
)
def test_bad_input_leaves_nothing(source, tmp_path, options, message):
    output = str(tmp_path / "new" / "out")
    options = {"input": str(source), "output": output, "workers": 0} | options
    with pytest.raises(DataError, match=message):
        prepare(PrepareConfig(**options))
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize("text", ["", "\n \n\t\n" * 9], ids=["empty", "blank lines"])
def test_empty_corpus(tmp_path, text):
    (tmp_path / "x.txt").write_text(text)
    with pytest.raises(DataError, match="empty corpus: no document with text"):
        prepare(config(tmp_path / "x.txt", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_gone_on_from(source, tmp_path, monkeypatch):
    def full(self, path):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shards.Shard, "write", full)
        with pytest.raises(DataError, match=r"cannot be written: .*No space left"):
            prepare(config(source, tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    assert prepare(config(source, tmp_path / "out")).is_dir()


def test_an_output_that_holds_something_else(source, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("do not touch")
    for output in (tmp_path / "mine", source):
        with pytest.raises(DataError, match="exists and is not a prepared folder"):
            prepare(config(source, output))
    with pytest.raises(DataError, match="cannot be written"):
        prepare(config(source, source / "below"))


@pytest.mark.parametrize("name", ["train.bin", "train.idx"])
def test_damage_is_found_when_a_folder_is_opened(source, tmp_path, name):
    out = prepare(config(source, tmp_path / "out"))
    content = bytearray((out / name).read_bytes())
    content[-3] ^= 1
    (out / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{name}: damaged"):
        open_split(out, "train", 257)
    (out / "card.json").write_text("{")
    with pytest.raises(DataError, match=r"card\.json: cannot be read|damaged"):
        open_split(out, "train", 257)


def test_a_smaller_vocabulary_is_refused_by_the_card(source, tmp_path):
    out = prepare(config(source, tmp_path / "out"))
    with pytest.raises(DataError, match="token id 256 is outside the vocabulary of 256"):
        open_split(out, "train", 256)
