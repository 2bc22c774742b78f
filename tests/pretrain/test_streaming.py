"""Streamed sources: every sample a function of its index, runs that are cut in two the same."""

from __future__ import annotations

import itertools
import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rondo.errors import UserError
from rondo.models.loading import find_checkpoint, read_tensors
from rondo.pretrain import load_recipe, train
from rondo.pretrain.data import DataError, Seen, load_tokenizer, row_sources
from rondo.pretrain.data.row_sources import open_rows
from rondo.pretrain.data.shards import held_out
from rondo.pretrain.data.streaming import StreamedSource
from rondo.pretrain.run_data import open_data

BYTES = load_tokenizer("bytes")


def documents(count: int = 90) -> list[str]:
    draw = random.Random(0)
    words = ["fish", "swims", "sings", "under", "over", "no", "one", "two", "three"]
    return [f"{i}: {' '.join(draw.choices(words, k=draw.randint(1, 30)))}" for i in range(count)]


def write(folder: Path, kind: str, texts: list[str]) -> Path:
    """Three files of a kind."""
    folder.mkdir(exist_ok=True)
    for number in range(3):
        rows = [{"id": i, "text": text} for i, text in enumerate(texts[number::3])]
        path = folder / f"part-{number}.{kind}"
        if kind == "jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        else:
            import pyarrow
            import pyarrow.parquet

            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=7)
    return folder


def stream(folder: Path, size: int = 8, fraction: float = 0.1, seed: int = 5) -> StreamedSource:
    rows = open_rows(str(folder))
    return StreamedSource(rows, BYTES, (seed, 0), size, fraction, history=500)


def texts_of(source: StreamedSource, tokens: int) -> list[str]:
    """The whole documents in the first tokens of a stream."""
    ids = bytes(min(i, 255) for i in source.window(0, tokens)[0].tolist())
    return [text.decode() for text in ids.split(b"\xff")[:-1]]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_an_epoch_has_every_document_once_shuffled_within_blocks(kind: str, tmp_path: Path) -> None:
    texts = documents()
    folder = write(tmp_path / "in", kind, texts)
    kept = [t for part in range(3) for t in texts[part::3] if not held_out(t.encode(), 0.1)]
    assert 0 < len(kept) < 90
    size = sum(len(text.encode()) + 1 for text in kept)
    found = texts_of(stream(folder), 2 * size)
    once, again = found[: len(kept)], found[len(kept) :]
    assert sorted(once) == sorted(again) == sorted(kept)
    assert once != kept and once != again
    assert sorted(once[:5]) != sorted(kept[:5]) or once[:5] != kept[:5]
    near = [abs(once.index(text) - i) for i, text in enumerate(kept)]
    assert max(near) < 8  # a block has eight rows at most
    assert texts_of(stream(folder, size=1), size) == kept
    assert texts_of(stream(folder, seed=6), size) != once


def test_windows_are_a_function_of_their_place(tmp_path: Path) -> None:
    """Whatever was read before; and from any state, which holds no text."""
    folder = write(tmp_path / "in", "jsonl", documents())
    length, starts = 33, range(0, 16_000, 200)  # more than two epochs
    source = stream(folder)
    states, windows = {}, {}
    for start in starts:
        windows[start] = source.window(start, length)
        states[start] = json.loads(json.dumps(source.state(start)))
        assert len(json.dumps(states[start])) < 2000
    assert any(state["epoch"] == 2 for state in states.values())
    for start in [*random.Random(1).sample(starts, 12), 0, starts[-1]]:
        other = stream(folder)
        other.resume(states[start])
        for mine, expected in zip(other.window(start, length), windows[start], strict=True):
            assert np.array_equal(mine, expected), start
    for start in (starts[-1], starts[40], 0, starts[3]):  # backwards, too
        assert np.array_equal(source.window(start, length)[0], windows[start][0])
    ids, segments = windows[0]
    ends = np.cumsum(np.concatenate([[0], ids[:-1] == 256]))
    assert np.array_equal(segments, ends)


def words(tmp_path: Path, *more: str) -> list[str]:
    return [
        f"--output_dir={tmp_path}/runs",
        f"--data.folder={tmp_path}/data",
        "--model.dim=32",
        "--model.num_layers=1",
        "--model.pattern=[gla]",
        "--model.ffn_dim=32",
        "--data.sequence_length=32",
        "--data.global_batch_size=4",
        "--data.micro_batch_size=2",
        "--data.validation_fraction=0.1",
        "--schedule.name=constant",
        "--schedule.warmup_steps=0",
        "--evals.batches=1",
        "--logging.tensorboard=false",
        *more,
    ]


def sources(folder: Path, text: Path) -> str:
    streamed = f"{{path: {folder}, streaming: true, shuffle_buffer: 8, weight: 3}}"
    return f"[{streamed}, {{path: {text}}}]"


def test_killed_and_resumed_is_uninterrupted(tmp_path: Path) -> None:
    """To the last bit, over epochs, beside a prepared source and through two stages."""
    folder = write(tmp_path / "in", "jsonl", documents(40))
    text = tmp_path / "text.txt"
    text.write_text("A prepared text.\n\n" * 300)
    stages = f"[{{name: a, steps: 20, data: {{sources: {sources(folder, text)}}}}}, "
    stages += f"{{name: b, steps: 22, data: {{sources: {sources(folder, text)}}}}}]"

    def run(name: str) -> Path:
        given = words(tmp_path, f"--name={name}", "--checkpoint.every=7", "--checkpoint.keep=0")
        assert train(load_recipe("tiny", [*given, f"--stages={stages}"])) == 0
        return find_checkpoint(tmp_path / "runs" / name)

    whole = run("whole")
    state = json.loads((whole / "state.json").read_text())["streams"]["0"]
    assert state["epoch"] >= 1 and state["rows"] is not None
    cut = tmp_path / "runs" / "cut" / "checkpoints"
    cut.mkdir(parents=True)
    for step in (14, 28):  # what a kill after these steps leaves; the second lies in stage b
        there = whole.parent / f"step-{step:09d}"
        shutil.rmtree(cut, ignore_errors=True)
        shutil.copytree(there, cut / there.name)
        again = run("cut")
        for part in ("model", "optimizer"):
            mine, expected = read_tensors(again / part), read_tensors(whole / part)
            assert all(torch.equal(mine[name], expected[name]) for name in expected)
    last = json.loads((whole.parents[1] / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["validation/a/loss"] > 0


def test_a_run_stays_with_the_commit_it_began_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the hub has by then, to the last bit; a new run takes the newest."""
    commits, read, real = ["first"], [], row_sources._load
    write(tmp_path / "first", "jsonl", documents(40))
    write(tmp_path / "second", "jsonl", documents(50)[::-1])

    def load(name: str, configuration: str | None, revision: str) -> Any:
        read.append((name, configuration, revision))
        files = sorted(str(file) for file in (tmp_path / revision).iterdir())
        return real("json", None, data_files=files)

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(row_sources, "require_hub", lambda path: None)
    monkeypatch.setattr(row_sources, "_revision", lambda path, name: commits[-1])
    monkeypatch.setattr(row_sources, "_load", load)
    source = "--data.sources=[{path: 'owner/name:en', streaming: true, shuffle_buffer: 8}]"

    def run(name: str, steps: int = 8, *more: str) -> Path:
        given = [f"--name={name}", f"--steps={steps}", "--checkpoint.every=4", source, *more]
        assert train(load_recipe("tiny", words(tmp_path, *given, "--checkpoint.keep=0"))) == 0
        return find_checkpoint(tmp_path / "runs" / name)

    whole = run("whole")
    half = whole.parent / "step-000000004"
    cut = tmp_path / "runs" / "cut" / "checkpoints"
    shutil.copytree(half, cut / half.name)
    commits.append("second")
    for again in (run("cut"), run("other", 8, f"--checkpoint.resume={half}")):
        mine, expected = read_tensors(again / "model"), read_tensors(whole / "model")
        assert all(torch.equal(mine[name], expected[name]) for name in expected)
    assert {*read} == {("owner/name", "en", "first")}
    assert open_rows("owner/name:en").identity == ["owner/name:en", "second"]
    fresh = json.loads((run("fresh", 4) / "state.json").read_text())["streams"]["0"]
    assert fresh["source"] == ["owner/name:en", "second"]
    monkeypatch.setattr(row_sources, "_load", real)
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: 1 / 0)
    with pytest.raises(DataError, match="owner/name at commit first: cannot be read"):
        run("cut", 9)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DataError, match="which HF_HUB_OFFLINE rules out; without streaming"):
        open_rows("owner/name:en")


def test_a_local_file_that_changed_is_named(tmp_path: Path) -> None:
    folder = write(tmp_path / "in", "jsonl", documents(40))
    source = f"--data.sources=[{{path: {folder}, streaming: true, shuffle_buffer: 8}}]"
    recipe = load_recipe("tiny", words(tmp_path, "--name=run", "--steps=2", source))
    assert train(recipe) == 0
    saved = json.loads((find_checkpoint(tmp_path / "runs" / "run") / "state.json").read_text())
    before = saved["streams"]["0"]["source"]
    assert open_rows(str(folder), before).identity == before
    other = write(tmp_path / "other", "jsonl", documents(9))
    assert open_rows(str(other), before).identity != before  # the run's fingerprint tells
    changed, gone = folder / "part-1.jsonl", folder / "part-2.jsonl"
    with changed.open("a") as file:
        file.write('{"text": "one more"}\n')
    with pytest.raises(DataError, match=r"part-1\.jsonl changed since the checkpoint"):
        train(recipe)
    gone.unlink()
    (folder / "part-0.jsonl").rename(folder / "part-00.jsonl")
    with pytest.raises(DataError, match=r"part-0\.jsonl is gone since the checkpoint"):
        open_rows(str(folder), before)


def test_samples_do_not_depend_on_who_reads_them(tmp_path: Path) -> None:
    """Two ranks see what one sees, and what another run would replay is refused."""
    folder = write(tmp_path / "in", "jsonl", documents())
    given = words(tmp_path, f"--data.sources=[{{path: {folder}, streaming: true}}]")
    recipe = load_recipe("tiny", given)
    one, held = open_data(recipe, tmp_path / "runs")
    every = [one.sample(i).tokens for i in range(40)]
    for rank in (0, 1):
        other, _ = open_data(recipe, tmp_path / "runs")
        for i in itertools.chain(range(2 * rank, 40, 4), range(2 * rank + 1, 40, 4)):
            assert np.array_equal(other.sample(i).tokens, every[i])
    text = bytes(held[""].sample(0).tokens[held[""].sample(0).tokens < 256].tolist()).decode()
    assert text[:20] in "".join(t for t in documents() if held_out(t.encode(), 0.1))
    seen = Seen("runs/other", json.loads(json.dumps(one.consumed(5))))
    with pytest.raises(DataError, match="as a stream, of which no tokens were kept to replay"):
        seen.open(BYTES, 32, 257, "stages.0.replay.source")


def test_what_cannot_be_streamed_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "in", "jsonl", documents(9))
    (tmp_path / "text.txt").write_text("text")
    with pytest.raises(DataError, match=r"JSON lines or of Parquet.* this has text.txt"):
        open_rows(str(tmp_path / "text.txt"))
    (tmp_path / "bad.jsonl").write_text('{"body": "x"}\n')
    with pytest.raises(DataError, match="no field 'text'; its fields are 'body'"):
        stream(tmp_path / "bad.jsonl").window(0, 5)
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(DataError, match="no document to train on"):
        stream(tmp_path / "empty.jsonl").window(0, 5)
    one = f"{{path: {folder}, streaming: true}}"
    other = f"{{path: {folder}, streaming: true, shuffle_buffer: 0}}"
    stages = f"[{{name: a, data: {{sources: [{one}]}}}}, "
    replay = stages + f"{{name: b, data: {{sources: [{one}]}}, replay: {{source: a}}}}]"
    with pytest.raises(UserError, match=r'stage "a" streams .* no tokens are kept to replay'):
        load_recipe("tiny", words(tmp_path, f"--stages={replay}"))
    listed = replay.replace("b,", "b, data: {sources: [{path: x}]}}, {name: c,")
    listed = listed.replace("source: a", "source: [b, a], share: [0.1, 0.1]")
    with pytest.raises(UserError, match=r"stages\.2\.replay: stage \"a\" streams .* no tokens"):
        load_recipe("tiny", words(tmp_path, f"--stages={listed}"))
    with pytest.raises(UserError, match="shuffle_buffer: must be at least 1, got 0"):
        load_recipe("tiny", words(tmp_path, f"--data.sources=[{other}]"))
    changed = stages + f"{{name: b, data: {{sources: [{{path: {folder}}}]}}}}]"
    with pytest.raises(UserError, match="goes on as it was, got False"):
        load_recipe("tiny", words(tmp_path, f"--stages={changed}"))
    recipe = load_recipe(
        "tiny", words(tmp_path, f"--data.sources=[{one}]", "--data.tokenizer=sentencepiece:300")
    )
    with pytest.raises(DataError, match=r"trained on whole sources, and .* is streamed"):
        open_data(recipe, tmp_path / "runs")
