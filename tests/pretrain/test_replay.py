"""Replay: how many samples, which ones and in which order; and the samples of a run in stages."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from rondo.models.config import ModelConfig
from rondo.pretrain.data import (
    Curriculum,
    DataError,
    PrepareConfig,
    Seen,
    Sources,
    TokenDataset,
    load_tokenizer,
    prepare,
    rank_indices,
    read_seen,
)
from rondo.pretrain.data.replay import Pool, Share, permuted
from rondo.pretrain.recipe import (
    DataConfig,
    Recipe,
    ReplayConfig,
    SourceConfig,
    StageConfig,
    StageDataConfig,
)
from rondo.pretrain.stages import all_sources

pytestmark = pytest.mark.quick
BATCH, LENGTH = 8, 16


def make(folder: Path, name: str) -> Path:
    """Documents that tell which source and document they are."""
    source = folder / f"{name}.jsonl"
    texts = [f"{name}{i:03d}" + "." * (i * 7 % 40) for i in range(400)]
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return prepare(PrepareConfig(str(source), str(folder / name), workers=0), quiet=True)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("data")
    return {name: make(root, name) for name in "AbC"}


def stage(name: str, steps: int, sources: str, replay: ReplayConfig | None = None) -> StageConfig:
    data = StageDataConfig([SourceConfig(letter) for letter in sources])
    return StageConfig(name, steps, data, replay=replay)


def curriculum(
    folders: dict[str, Path], *stages: StageConfig, seen: dict[tuple[str, str], Seen] | None = None
) -> Curriculum:
    data = DataConfig(sequence_length=LENGTH, global_batch_size=BATCH)
    recipe = Recipe("run", ModelConfig(), data=data, stages=list(stages))
    sources = all_sources(recipe)
    prepared = [folders[source.path] for source in sources]
    weights = [source.weight for source in sources]
    return Curriculum(recipe, Sources(prepared, weights, load_tokenizer("bytes")), seen=seen)


def text(data: Curriculum | TokenDataset, index: int) -> bytes:
    return bytes(t % 256 for t in data.sample(index).tokens)


def texts(data: Curriculum | TokenDataset, begin: int, end: int) -> list[bytes]:
    return [text(data, index) for index in range(begin, end)]


@pytest.mark.parametrize("rho", [0.0, 0.005, 0.05, 0.1, 0.25, 1 / 3, 0.5, 0.95, 1.0])
@pytest.mark.parametrize("batch", [7, 8, 1104])
def test_every_batch_and_every_prefix_holds_its_share(rho: float, batch: int) -> None:
    share, exact = Share(rho), Fraction(repr(rho))
    holds = [share.holds(index) for index in range(4 * batch)]
    counts = np.concatenate([[0], np.cumsum(holds)])
    assert [share.before(index) for index in range(4 * batch + 1)] == counts.tolist()
    assert all(abs(count - exact * n) <= Fraction(1, 2) for n, count in enumerate(counts.tolist()))
    for start in range(0, 4 * batch, batch):
        assert abs(sum(holds[start : start + batch]) - exact * batch) <= 1
    if (rho, batch) == (0.05, 1104):
        assert {sum(holds[start : start + 1104]) for start in range(0, 4416, 1104)} <= {55, 56}


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8, 1000])
def test_a_shuffle_is_a_permutation_that_its_seed_chooses(size: int) -> None:
    first = [permuted(index, size, 1) for index in range(size)]
    assert sorted(first) == list(range(size))
    if size == 1000:
        assert first != [permuted(index, size, 2) for index in range(size)]
        moved = np.corrcoef(first, np.arange(size))[0, 1]
        assert abs(moved) < 0.1


def test_no_replay_is_the_same_as_a_share_of_0(folders: dict[str, Path]) -> None:
    first = stage("first", 5, "A")
    without = curriculum(folders, first, stage("second", 5, "b"))
    nothing = curriculum(folders, first, stage("second", 5, "b", ReplayConfig(0.0)))
    assert texts(without, 0, 80) == texts(nothing, 0, 80)
    assert without.fingerprint(9) == nothing.fingerprint(9)


def test_a_share_of_1_reads_only_what_was_seen_in_its_order(folders: dict[str, Path]) -> None:
    data = curriculum(folders, stage("a", 5, "Ab"), stage("b", 5, "C", ReplayConfig(1.0)))
    assert texts(data, 40, 80) == texts(data, 0, 40)
    rotated = ReplayConfig(1.0, offset=3)
    data = curriculum(folders, stage("a", 5, "Ab"), stage("b", 5, "C", rotated))
    assert texts(data, 40, 80) == texts(data, 3, 40) + texts(data, 0, 3)
    shuffled = ReplayConfig(1.0, order="reshuffled", seed=5)
    data = curriculum(folders, stage("a", 5, "Ab"), stage("b", 5, "C", shuffled))
    places = [permuted(index, 40, 5) for index in range(40)]
    assert texts(data, 40, 80) == [text(data, place) for place in places]


def test_new_and_replayed_samples_interleave(folders: dict[str, Path]) -> None:
    data = curriculum(folders, stage("a", 6, "A"), stage("b", 10, "b", ReplayConfig(0.25, "a")))
    old = [index for index in range(48, 128) if data.find(index)[2]]
    new = [index for index in range(48, 128) if not data.find(index)[2]]
    assert len(old) == 20 and len(new) == 60
    assert [text(data, index) for index in old] == texts(data, 0, 20)
    alone = curriculum(folders, stage("a", 6, "A"), stage("b", 8, "b"))
    assert [text(data, index) for index in new] == texts(alone, 48, 108)
    assert {data.source(index) for index in old} == {0} and {data.source(i) for i in new} == {1}


def test_earlier_is_what_all_stages_before_have_seen_as_new(folders: dict[str, Path]) -> None:
    """In a third and a fourth stage; what the second replayed is not replayed as its own."""
    first, second = stage("a", 3, "A"), stage("b", 4, "b", ReplayConfig(0.25, "a"))
    third, fourth = (ReplayConfig(share, offset=0) for share in (0.75, 1.0))
    data = curriculum(folders, first, second, stage("c", 6, "C", third), stage("d", 7, "C", fourth))
    new = [i for i in range(104) if not data.find(i)[2]]
    old = [i for i in range(56, 104) if data.find(i)[2]]
    assert len(old) == 36 and len([i for i in new if i < 56]) == 24 + 24
    assert [text(data, i) for i in old] == [text(data, i) for i in new[:36]]
    assert texts(data, 104, 160) == [text(data, i) for i in new[:56]]


@pytest.mark.parametrize("order", ["original", "reshuffled"])
def test_several_sources_with_a_share_each(
    order: Literal["original", "reshuffled"], folders: dict[str, Path]
) -> None:
    """Two stages and another run: each by its share in every prefix, each in its own order."""
    other = curriculum(folders, stage("x", 9, "b"))
    seen = {("c", "runs/other"): Seen("runs/other", json.loads(json.dumps(other.consumed(9))))}
    shares, sources = [0.2, 0.1, 0.05], ["a", "runs/other", "b"]
    replay = ReplayConfig(shares, sources, order, offset=[3, 0, 1], seed=2)
    begin = [stage("a", 5, "A"), stage("b", 4, "b")]
    data = curriculum(folders, *begin, stage("c", 20, "C", replay), seen=seen)
    pools = [
        Pool([part], shuffled=order == "reshuffled", offset=offset, seed=2)
        for part, offset in (
            (((data.parts[0].own, 40)), 3),
            ((other.parts[0].own, 72), 0),
            ((data.parts[1].own, 32), 1),
        )
    ]
    counts, numbers = [0, 0, 0], {0: 0, 3: 1, 1: 2}  # by source, another run's behind all others
    for n in range(160):
        if data.find(72 + n)[2]:
            which = numbers[data.source(72 + n)]
            assert text(data, 72 + n) == bytes(
                t % 256 for t in pools[which].sample(counts[which]).tokens
            )
            counts[which] += 1
        assert all(
            abs(count - share * (n + 1)) <= 1 for count, share in zip(counts, shares, strict=True)
        )
    assert counts == [32, 16, 8]
    told = data.consumed(29)["stages"][-1]["replay"]
    assert (told["of"], told["samples"]) == ([40, 72, 32], counts)
    with pytest.raises(DataError, match=r"stages\.2\.replay: 160 samples of a, .* seen 40"):
        curriculum(folders, *begin, stage("c", 100, "C", replay), seen=seen)


@pytest.mark.parametrize("order", ["original", "reshuffled"])
def test_a_later_stage_replays_what_comes_next(
    order: Literal["original", "reshuffled"], folders: dict[str, Path]
) -> None:
    """Of the same source in the same order; after the last comes the first again. An offset of 0
    begins anew, and the fingerprint of what older recipes said is as it was."""
    old = ReplayConfig(0.25, "a", order)
    one, two = stage("b", 10, "b", old), stage("c", 10, "C", old)
    begin = stage("a", 4, "A")
    data = curriculum(folders, begin, one, two)
    replayed = [[i for i in range(b, e) if data.find(i)[2]] for b, e in ((32, 112), (112, 192))]
    places = [data.parts[1].pools.pools[0].place(n) for n in range(32)]  # type: ignore[union-attr]
    wanted = [text(data, place) for place in places]
    first, second = ([text(data, i) for i in part] for part in replayed)
    assert first == wanted[:20] and second == wanted[20:] + wanted[:8]
    assert [each["replay"]["offset"] for each in data.consumed(24)["stages"][1:]] == [0, 20]
    zero = ReplayConfig(0.25, "a", order, offset=0)
    anew = curriculum(folders, begin, stage("b", 10, "b", zero), stage("c", 10, "C", zero))
    assert [text(anew, i) for i in replayed[1]] == first
    assert anew.fingerprint(14) == data.fingerprint(14)
    assert anew.fingerprint(15) != data.fingerprint(15)


def test_each_of_several_sources_goes_on_by_itself(folders: dict[str, Path]) -> None:
    begin = [stage("a", 5, "A"), stage("b", 5, "b")]
    third = stage("c", 10, "C", ReplayConfig([0.1, 0.2], ["a", "b"]))
    data = curriculum(folders, *begin, third, stage("d", 5, "C", ReplayConfig(0.2, "b")))
    last = [text(data, i) for i in range(160, 200) if data.find(i)[2]]
    assert last == texts(data, 56, 64)
    both = stage("d", 5, "C", ReplayConfig([0.2, 0.1], ["b", "a"]))
    again = curriculum(folders, *begin, third, both).consumed(25)["stages"][-1]["replay"]
    assert again["offset"] == [16, 8] and again["samples"] == [8, 4]


def test_several_sources_with_one_share_are_one_pool(folders: dict[str, Path]) -> None:
    begin = [stage("a", 3, "A"), stage("b", 2, "b")]
    both = stage("c", 5, "C", ReplayConfig(0.9, ["a", "b"], "reshuffled"))
    earlier = stage("c", 5, "C", ReplayConfig(0.9, order="reshuffled"))
    pooled = curriculum(folders, *begin, both)
    assert texts(pooled, 40, 80) == texts(curriculum(folders, *begin, earlier), 40, 80)


def test_a_source_goes_on_where_an_earlier_stage_left_it(folders: dict[str, Path]) -> None:
    whole = curriculum(folders, stage("a", 12, "A"))
    parts = curriculum(folders, stage("a", 5, "A"), stage("b", 3, "b"), stage("c", 7, "A"))
    assert texts(parts, 0, 40) + texts(parts, 64, 120) == texts(whole, 0, 96)
    assert parts.epochs(120)[0] == pytest.approx(whole.epochs(96)[0])


def test_a_run_without_stages_is_as_it_was(folders: dict[str, Path]) -> None:
    prepared, tokenizer = [folders["A"], folders["b"]], load_tokenizer("bytes")
    plain = TokenDataset(Sources(prepared, [1.0, 1.0], tokenizer), LENGTH, 0)
    data = curriculum(folders, stage("", 4, "Ab"))
    assert texts(data, 0, 32) == texts(plain, 0, 32)
    assert data.fingerprint(4) == plain.fingerprint()


def test_ranks_divide_a_batch_whatever_their_number(folders: dict[str, Path]) -> None:
    data = curriculum(folders, stage("a", 3, "A"), stage("b", 3, "b", ReplayConfig(0.3)))
    for step in range(6):
        wanted = texts(data, step * BATCH, (step + 1) * BATCH)
        for world in (1, 2, 4):
            found = []
            for rank in range(world):
                for chunk in rank_indices(step, BATCH, rank, world, 2):
                    found += [
                        bytes(t % 256 for t in row) for row in data.batch(chunk).tokens.tolist()
                    ]
            assert found == [row[:-1] for row in wanted]


def test_the_record_says_what_was_consumed_at_any_step(folders: dict[str, Path]) -> None:
    """Ranges of samples by stage and source, recounted sample by sample."""
    replay = ReplayConfig(0.4, "a", order="reshuffled", offset=2, seed=3)
    data = curriculum(folders, stage("a", 5, "Ab"), stage("b", 6, "bC", replay))
    for step in (0, 1, 4, 5, 6, 11):
        record = json.loads(json.dumps(data.consumed(step)))
        assert (record["step"], record["samples"]) == (step, step * BATCH)
        counted: dict[tuple[str, int], int] = {}
        replayed = 0
        for index in range(step * BATCH):
            name = "a" if index < 40 else "b"
            if data.find(index)[2]:
                replayed += 1
            else:
                key = (name, data.source(index))
                counted[key] = counted.get(key, 0) + 1
        told = {
            (each["name"], source["number"]): source["samples"][1] - source["samples"][0]
            for each in record["stages"]
            for source in each["sources"]
        }
        assert {key: count for key, count in told.items() if count} == counted
        assert len(record["stages"]) == (2 if step > 5 else 1)
        if step > 5:
            first, second = record["stages"]
            assert second["replay"]["samples"] == replayed and second["replay"]["of"] == 40
            by_number = {source["number"]: source["samples"] for source in second["sources"]}
            ends = {source["number"]: source["samples"][1] for source in first["sources"]}
            assert by_number[1][0] == ends[1] and by_number[2][0] == 0


def test_another_run_is_replayed_as_far_as_it_came(folders: dict[str, Path]) -> None:
    """Its new samples in its order, mixtures and all, from what its checkpoint tells."""
    other = curriculum(folders, stage("a", 9, "Ab"), stage("b", 9, "C", ReplayConfig(0.5)))
    record = json.loads(json.dumps(other.consumed(11)))
    replay = ReplayConfig(1.0, source="runs/other")
    key = ("x", "runs/other")
    data = curriculum(folders, stage("x", 10, "C", replay), seen={key: Seen("runs/other", record)})
    new = [index for index in range(88) if not other.find(index)[2]]
    assert texts(data, 0, 80) == [text(other, index) for index in new]
    assert {data.source(index) for index in range(80)} == {1}
    assert len(new) == 80
    with pytest.raises(DataError, match=r"stages\.0\.replay: 88 samples of runs/other, .* seen 80"):
        curriculum(folders, stage("x", 11, "C", replay), seen={key: Seen("runs/other", record)})
    for name, value, words in (
        ("sequence_length", 32, "trained on sequences of 32 tokens"),
        ("tokenizer", "0", "has another tokenizer"),
    ):
        changed = {key: Seen("runs/other", {**record, name: value})}
        with pytest.raises(DataError, match=words):
            curriculum(folders, stage("x", 10, "C", replay), seen=changed)
    record["stages"][0]["sources"][0]["content"] = ["other"]
    with pytest.raises(DataError, match="whose tokens have changed since"):
        curriculum(folders, stage("x", 10, "C", replay), seen={key: Seen("runs/other", record)})


def test_a_kept_record_goes_before_one_that_has_grown(tmp_path: Path) -> None:
    copy = tmp_path / "replay" / "0-x.json"
    Seen("runs/other", {"version": 1, "step": 3}).write(copy)
    assert read_seen("runs/other", copy).record["step"] == 3
    with pytest.raises(DataError, match="runs/another: neither a checkpoint nor a run"):
        read_seen("runs/another", copy)


def test_the_fingerprint_covers_what_has_begun(folders: dict[str, Path]) -> None:
    """Later stages, and how long the present one lasts, may still change."""
    a, b = stage("a", 5, "A"), stage("b", 5, "b", ReplayConfig(0.2))
    both = curriculum(folders, a, b)
    assert both.fingerprint(5) == curriculum(folders, stage("a", 7, "A")).fingerprint(5)
    assert both.fingerprint(6) != curriculum(folders, stage("a", 6, "A"), b).fingerprint(7)
    longer = curriculum(folders, a, stage("b", 9, "b", ReplayConfig(0.2)))
    assert both.fingerprint(6) == longer.fingerprint(6)
    other = curriculum(folders, a, stage("b", 5, "b", ReplayConfig(0.3)))
    assert both.fingerprint(6) != other.fingerprint(6)


def test_impossible_pools_are_refused(folders: dict[str, Path]) -> None:
    data = curriculum(folders, stage("a", 2, "A"))
    own = data.parts[0].own
    with pytest.raises(DataError, match="has seen no samples yet"):
        Pool([(own, 0)])
    with pytest.raises(DataError, match="offset is 16, but 16 samples were seen"):
        Pool([(own, 16)], offset=16)
    with pytest.raises(DataError, match="sample 16 of 16 that were seen"):
        Pool([(own, 16)]).place(16)
