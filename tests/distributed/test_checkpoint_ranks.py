"""Checkpoints written and read by different numbers of ranks.

Processes take seconds to start, so everything runs on 2, 3, 4 and again 2 of them, once.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from safetensors import safe_open

from rondo.models import manifest
from rondo.models.loading import read_tensors
from rondo.parallel.checkpoint import state_digest
from rondo.tests.distributed import checkpoint_cases as cases
from rondo.tests.distributed.spawn import run_ranks

STEP_5, STEP_10 = "step-000000005", "step-000000010"


class Outcome(NamedTuple):
    """What came of it all; lists are by rank."""

    folder: Path
    saved: list[list[str]]
    full_disk: list[Any]
    resharded: dict[str, list[Any]]
    back: list[Any]
    damaged: list[Any]
    none_valid: list[str]
    wrong_model: list[str]
    another_has_saved: list[tuple[Path, str]]


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    folder = tmp_path_factory.mktemp("ranks")
    two = folder / "2"
    first = run_ranks(
        cases.in_turn,
        2,
        (cases.save, (two, 0, [5, 10])),
        (cases.failing_write, (folder / "full",)),
    )
    resharded = {"1": [cases.load_and_save([two], folder / "1")]}
    resharded["3"] = run_ranks(cases.load_and_save, 3, [two], folder / "3")
    four = run_ranks(
        cases.in_turn,
        4,
        (cases.load_and_save, ([two], folder / "4")),
        (cases.load_and_save, ([folder / "4"], folder / "2x2", 2)),
    )
    resharded["4"], resharded["2x2"] = (list(by_rank) for by_rank in zip(*four, strict=True))
    shutil.copytree(two, folder / "damaged")
    _flip_what_rank_1_verifies(folder / "damaged" / STEP_10)
    shutil.copytree(folder / "damaged", folder / "none valid")
    _flip_what_rank_1_verifies(folder / "none valid" / STEP_5)
    second = run_ranks(
        cases.in_turn,
        2,
        (cases.load_and_save, ([folder / n for n in resharded], None)),
        (cases.load_and_save, ([folder / "damaged"], None)),
        (cases.none_valid, (folder / "none valid",)),
        (cases.wrong_model, (two,)),
        (cases.another_has_saved, (two,)),
    )
    saved, full_disk = (list(by_rank) for by_rank in zip(*first, strict=True))
    back, *refused = (list(by_rank) for by_rank in zip(*second, strict=True))
    return Outcome(folder, saved, full_disk, resharded, back, *refused)


def _flip_what_rank_1_verifies(checkpoint: Path) -> None:
    """Ranks take turns down the sorted list of files; changes the last bit of the second."""
    file = checkpoint / sorted(manifest.read(checkpoint).files)[1]
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def test_any_number_of_ranks_reads_what_two_wrote(outcome: Outcome) -> None:
    assert outcome.saved[0] == outcome.saved[1]
    assert len(set(outcome.saved[0])) == 2
    expected = (STEP_10, outcome.saved[0][1], 0.1 + 10 / 3)
    assert [len(results) for results in outcome.resharded.values()] == [1, 3, 4, 4]
    for results in outcome.resharded.values():
        assert results == [[expected]] * len(results)
    assert outcome.back == [[expected] * 4] * 2


def test_tensors_are_read_without_ranks(outcome: Outcome) -> None:
    for layout in ("2", *outcome.resharded):
        path = outcome.folder / layout / STEP_10
        whole = {part: read_tensors(path / part) for part in ("model", "optimizer")}
        assert state_digest(whole) == outcome.saved[0][1]
        assert whole["optimizer"]["embed.weight.step"] == 2


@pytest.mark.parametrize("layout", ["2", "2x2"])
def test_slices_are_divided_and_copies_written_once(outcome: Outcome, layout: str) -> None:
    names: list[str] = []
    for part in ("model", "optimizer"):
        for file in (outcome.folder / layout / STEP_10 / part).glob("*.safetensors"):
            with safe_open(file, framework="pt") as stream:
                names += [f"{part}/{name}" for name in stream.keys()]  # noqa: SIM118
    assert names.count("model/embed.weight") == 2
    assert names.count("optimizer/up.weight.momentum_buffer") == 2
    assert names.count("model/gain") == names.count("model/count") == 1
    assert names.count("optimizer/gain.step") == 1


def test_one_full_disk_is_known_to_all_ranks(outcome: Outcome) -> None:
    for messages, after, later in outcome.full_disk:
        for step, message in zip((2, 3), messages, strict=True):
            assert f"step-{step:09d}: rank 1: OSError: [Errno 28] No space left" in message
        assert after == ["step-000000001"]
        assert later == ["step-000000001", "step-000000004"]


def test_all_ranks_pass_over_a_damaged_checkpoint(outcome: Outcome) -> None:
    assert outcome.damaged == [[(STEP_5, outcome.saved[0][0], 0.1 + 5 / 3)]] * 2


def test_all_ranks_refuse_a_folder_of_damaged_checkpoints(outcome: Outcome) -> None:
    for message in outcome.none_valid:
        assert f"none of the 2 checkpoint(s) in {outcome.folder}/none valid is valid" in message


def test_checkpoint_of_another_model(outcome: Outcome) -> None:
    for message in outcome.wrong_model:
        assert "checkpoint of another model: gain is (9,), expected (4,)" in message
        assert message.endswith("untouched=True")


def test_ranks_agree_on_what_another_run_has_saved(outcome: Outcome) -> None:
    for found, message in outcome.another_has_saved:
        assert found == outcome.folder / "2/step-0"
        assert "runs/other had come to step 7 " in message and "and to step 8 " in message
        assert "where rank 1 did: it has saved meanwhile" in message
