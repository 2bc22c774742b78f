"""Repeated data: the two laws, the account of a run, and exact duplicates."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from rondo.errors import UserError
from rondo.models import ModelConfig
from rondo.models.mixer import Cost
from rondo.parallel.mesh import Ranks
from rondo.pretrain.data import Curriculum, PrepareConfig, Sources, load_tokenizer, prepare
from rondo.pretrain.data.duplicates import (
    duplicate_report,
    first_copies,
    read_multiplicities,
)
from rondo.pretrain.data.errors import DataError
from rondo.pretrain.data.repeats import (
    Repeats,
    account,
    damage_band,
    describe,
    effective_tokens,
    token_value,
    warnings,
)
from rondo.pretrain.data.token_files import TokenFile
from rondo.pretrain.recipe import (
    DataConfig,
    Recipe,
    ReplayConfig,
    SourceConfig,
    StageConfig,
    StageDataConfig,
)
from rondo.pretrain.repeats_view import planned_repeats, repeats_data
from rondo.pretrain.words import greeting

pytestmark = pytest.mark.quick


def test_worth_of_repeated_tokens() -> None:
    epochs = {1: 1.0, 2: 0.984, 4: 0.931, 8: 0.828, 16: 0.662, 40: 0.379}
    for count, worth in epochs.items():
        assert token_value(count) == pytest.approx(worth, abs=6e-4)
    assert effective_tokens(1000, 0.25) == 250 and token_value(0.25) == 1
    assert effective_tokens(1.0, 1e6) == pytest.approx(16.4)


def test_damage_band() -> None:
    bands = {1e8: (139, 5100), 8e8: (43, 1803), 3e9: (21, 931), 7e9: (13, 610)}
    for parameters, band in bands.items():
        assert damage_band(parameters) == pytest.approx(band, rel=0.02)


def test_warnings_name_the_source_and_the_reason() -> None:
    once = Repeats("web", 1_000_000, 2_000_000, 0.9)
    often = Repeats("books", 100_000, 1_000, 0.1)
    assert warnings([once], 10**9) == []
    many, band = warnings([once, often], 8 * 10**8)
    assert "books is read 100.0 times" in many and "worth about 16,37" in many
    assert "43 to 1,803" in band and "10.0% of the run" in band
    assert len(warnings([once, often], 10**7)) == 1  # 505 repeats and more harm so small a model
    assert len(warnings([Repeats("all", 100_000, 1_000, 1.0)], 8 * 10**8)) == 1
    assert "0.50 epochs" in describe([once])[0]


def test_warnings_of_documents_that_occur_more_than_once() -> None:
    """Copies times epochs against the band (43 to 1,803 at 800M parameters), shares of the run."""

    def found(copies: dict[int, float], epochs: float = 2.0, share: float = 1.0) -> list[str]:
        return warnings([Repeats("web", round(1e6 * epochs), 10**6, share, copies)], 8 * 10**8)

    [line] = found({2: 0.3, 30: 0.1})
    assert "occur 30 times in web are read 60.0 times and are 10.0% of the run's new" in line
    assert "43 to 1,803 repeats" in line and "--drop_duplicates true" in line
    [line] = found({21: 0.5, 30: 0.004, 50: 0.004, 900: 0.004, 1000: 0.5})  # 42 and 2,000 are out
    assert "occur 30 to 900 times in web are read 60.0 to 1,800.0 times and are 1.2%" in line
    assert found({30: 0.1}, epochs=1.0) == []
    assert found({30: 0.1}, share=0.05) == []  # half a percent of the run
    assert found({30: 0.6}) == [] and len(found({30: 0.6}, share=0.5)) == 1


def test_account_of_shares() -> None:
    found = account(["a", "b"], {0: 100, 1: 4000}, {0: 30, 1: 70}, 10)
    assert [each.epochs for each in found] == [3.0, 0.175]
    assert [each.share for each in found] == [0.3, 0.7]
    assert [each.copies for each in found] == [{}, {}]


def texts(tmp_path, documents: list[str]):
    path = tmp_path / "source.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return str(path)


def made(tmp_path, documents: list[str], name: str, **options):
    config = PrepareConfig(texts(tmp_path, documents), str(tmp_path / name), workers=0, **options)
    return prepare(config, quiet=True)


def test_epochs_of_a_run_follow_weights_and_sizes(tmp_path) -> None:
    sizes = {"small": 20, "large": 200}
    folders = []
    for name, count in sizes.items():
        (tmp_path / f"{name}-in").mkdir()
        lines = [f"{name} document number {i}\n" for i in range(count)]
        folders.append(made(tmp_path / f"{name}-in", lines, name, validation_fraction=0.0))
    sources = [
        SourceConfig(str(folder), weight)
        for folder, weight in zip(folders, (1.0, 3.0), strict=True)
    ]
    data = DataConfig(sources, sequence_length=16, global_batch_size=40)
    recipe = Recipe("x", ModelConfig(), steps=100, data=data)
    opened = Sources(folders, [1.0, 3.0], load_tokenizer("bytes"))
    training = Curriculum(recipe, opened)
    found = training.repeats(["small", "large"])
    for each, weight in zip(found, (0.25, 0.75), strict=True):
        assert each.epochs == pytest.approx(weight * 4000 * 16 / each.unique, rel=0.01)
        assert each.share == pytest.approx(weight, rel=0.01)
    assert training.epochs(4000) == {i: each.epochs for i, each in enumerate(found)}
    assert planned_repeats(recipe) == found
    told = repeats_data(recipe, 10**6)
    assert told is not None and told["sources"][0]["epochs"] == found[0].epochs
    assert "small is read" in told["warnings"][0]
    most = max(each.epochs for each in found)
    allowed = replace(recipe, data=replace(data, max_epochs=most))
    assert planned_repeats(allowed) == found
    refused = replace(recipe, data=replace(data, max_epochs=0.99 * most))
    with pytest.raises(UserError, match=r"small would be read .* data.max_epochs") as caught:
        planned_repeats(refused)
    assert "large" not in str(caught.value)
    run = SimpleNamespace(
        recipe=refused,
        config=ModelConfig(vocab_size=259),
        cost=Cost(1.0, 10**6, 0),
        ranks=Ranks(0, 1, torch.device("cpu"), None),
        tokens_per_step=640,
        peak_flops=1.0,
        reweighting=SimpleNamespace(domains=["small", "large"], notes=lambda vocab_size: []),
        training=training,
    )
    with pytest.raises(UserError, match="small would be read"):
        list(greeting(run))
    unprepared = replace(recipe, data=replace(data, sources=[SourceConfig("stdlib-code")]))
    assert planned_repeats(unprepared) is None

    first = StageConfig("one", "60%", StageDataConfig(sources))
    replay = ReplayConfig(share=0.25, source="one")
    second = StageConfig("two", "40%", StageDataConfig(sources[1:]), replay=replay)
    staged = replace(recipe, stages=[first, second])
    found = Curriculum(staged, opened).repeats(["small", "large"])
    assert [each.tokens for each in found] == [600 * 16, (1800 + 1200) * 16]
    assert [each.share for each in found] == [600 / 3600, 3000 / 3600]  # without 400 replayed ones
    assert "83.3% of the new tokens" in describe(found)[1]
    assert planned_repeats(staged) == found


def test_repetition_that_was_put_in_is_found_and_held_out_text_has_none_of_it(tmp_path) -> None:
    """Hernandez et al.'s knobs: a tenth of the tokens is a small part, read 8 times."""
    unique, times, share = 720, 8, 0.1
    documents = [f"text number {i:06d}" for i in range(unique)]
    chosen = [f"copy number {i:06d}" for i in range(round(share * unique / (1 - share) / times))]
    mixed = np.random.default_rng(0).permutation(documents + times * chosen).tolist()
    folder = made(tmp_path, mixed, "injected", validation_fraction=0.1)
    report = json.loads((folder / "duplicates.json").read_text())
    assert report["multiplicities"] == {
        "1": {"texts": unique, "token_share": pytest.approx(1 - share)},
        "8": {"texts": len(chosen), "token_share": pytest.approx(share)},
    }
    assert read_multiplicities(folder) == {8: pytest.approx(share)}
    recipe = Recipe(
        "x",
        ModelConfig(),
        steps=round(1.5 * TokenFile(folder / "train").num_tokens / 160),
        data=DataConfig([SourceConfig(str(folder))], sequence_length=16, global_batch_size=10),
    )
    opened = Curriculum(recipe, Sources([folder], [1.0], load_tokenizer("bytes")))
    for account_of in (planned_repeats(recipe), opened.repeats(["injected"])):
        [line] = warnings(account_of, 10**10)  # 10 to 510 repeats
        assert "occur 8 times in injected are read 12.0 times and are 10.0% of the run" in line
    files = {split: TokenFile(folder / split) for split in ("train", "validation")}
    texts = {name: {bytes(file[i]) for i in range(len(file))} for name, file in files.items()}
    assert len(texts["validation"]) > 50 and not texts["train"] & texts["validation"]


def test_first_copies_and_multiplicities() -> None:
    numbers = np.array([5, 3, 5, 9, 3, 5])
    hashes = np.stack([numbers // 4, numbers], axis=1).astype(np.uint64)
    assert first_copies(hashes).tolist() == [True, True, False, True, False, False]
    report = duplicate_report(hashes, np.array([10, 2, 10, 6, 2, 10]))
    assert report["duplicate_documents"] == 3 and report["duplicate_tokens"] == 22
    assert report["duplicate_share"] == 22 / 40
    assert report["multiplicities"] == {
        "1": {"texts": 1, "token_share": 6 / 40},
        "2": {"texts": 1, "token_share": 4 / 40},
        "3": {"texts": 1, "token_share": 30 / 40},
    }


def test_prepare_reports_duplicates_and_drops_them_if_asked(tmp_path) -> None:
    documents = [f"text number {i}" for i in range(40)]
    documents += [documents[7]] * 3 + [documents[9]]
    reports = {}
    for name, drop in (("kept", False), ("dropped", True)):
        folder = made(tmp_path, documents, name, drop_duplicates=drop)
        card = json.loads((folder / "card.json").read_text())
        reports[name] = json.loads((folder / "duplicates.json").read_text())
        held = sum(split["documents"] for split in card["splits"].values())
        assert held == (40 if drop else 44) and card["duplicate_documents"] == 4
        assert "duplicates.json" in card["files"]
    assert read_multiplicities(tmp_path / "kept").keys() == {2, 4}
    assert read_multiplicities(tmp_path / "dropped") == {}
    assert read_multiplicities(tmp_path) == {}
    (tmp_path / "duplicates.json").write_text('{"dropped": false}')
    with pytest.raises(DataError, match=r"duplicates\.json: cannot be read .'multiplicities'"):
        read_multiplicities(tmp_path)
    assert reports["kept"] | {"dropped": True} == reports["dropped"]
    times = {n: found["texts"] for n, found in reports["kept"]["multiplicities"].items()}
    assert times == {"1": 38, "2": 1, "4": 1}
