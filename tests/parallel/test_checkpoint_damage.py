"""Damaged and hostile checkpoints: never loaded, no code run, no memory filled."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from rondo.errors import UserError
from rondo.models import manifest
from rondo.models.loading import OFFSETS_KEY, SLICES_KEY, read_tensors, tensor_index
from rondo.parallel.checkpoint import Checkpointer, CheckpointError

SHARD = "model/shard-00001.safetensors"


def tensors() -> dict[str, dict[str, Tensor]]:
    return {
        "model": {"weight": torch.arange(12.0).view(3, 4), "bias": torch.ones(3)},
        "optimizer": {"weight.step": torch.tensor(5.0)},
    }


@pytest.fixture
def run(tmp_path: Path) -> Checkpointer:
    """Valid checkpoints of steps 1 and 2."""
    checkpointer = Checkpointer(tmp_path, keep=0, asynchronous=False)
    for step in (1, 2):
        checkpointer.save(step, tensors(), {"step": step}, {"model/config.json": "{}"})
    return checkpointer


def assert_refused(run: Checkpointer, reason: str) -> None:
    """Step 2 is passed over, loading it raises, and no tensor is touched."""
    bad = run.folder / "step-000000002"
    assert run.newest() == run.folder / "step-000000001"
    filled = {part: {n: t.clone() for n, t in g.items()} for part, g in tensors().items()}
    with pytest.raises(CheckpointError, match=reason):
        run.load(bad, filled)
    for part, by_name in tensors().items():
        assert all(filled[part][name].equal(tensor) for name, tensor in by_name.items())


def test_a_flipped_bit_anywhere_is_noticed(run: Checkpointer) -> None:
    rng = random.Random(0)
    files = [path for path in (run.folder / "step-000000002").rglob("*") if path.is_file()]
    assert len(files) == 5
    for file in files:
        content = file.read_bytes()
        offsets = {0, len(content) // 2, len(content) - 1}
        for offset in offsets | {rng.randrange(len(content)) for _ in range(20)}:
            damaged = bytearray(content)
            damaged[offset] ^= 1 << rng.randrange(8)
            file.write_bytes(damaged)
            reason = "manifest.json" if file.name == manifest.NAME else "has sha256 .*, expected "
            assert_refused(run, reason)
        file.write_bytes(content)
    assert run.newest() == run.folder / "step-000000002"


def test_a_truncated_file_is_noticed(run: Checkpointer) -> None:
    for file in (run.folder / "step-000000002").rglob("*.*"):
        content = file.read_bytes()
        for size in (len(content) - 1, len(content) // 2, 0):
            os.truncate(file, size)
            own = file.name == manifest.NAME
            assert_refused(run, "manifest.json" if own else f"has {size} bytes, expected ")
            file.write_bytes(content)


def test_damaged_checkpoints_are_not_mistaken_for_none(run: Checkpointer) -> None:
    for step in (1, 2):
        os.truncate(run.folder / f"step-{step:09d}" / SHARD, 9)
    with pytest.raises(CheckpointError) as caught:
        run.newest()
    assert str(caught.value) == (
        f"checkpoint.resume: none of the 2 checkpoint(s) in {run.folder} is valid, so there is "
        "nothing to go on from; to start over, give another --name or move that folder away"
    )
    shutil.rmtree(run.folder / "step-000000001")
    shutil.rmtree(run.folder / "step-000000002")
    assert run.newest() is None


def swap(folder: Path) -> None:
    shutil.copy(folder.with_name("step-000000001") / "state.json", folder / "state.json")


def of_another_step(folder: Path) -> None:
    shutil.rmtree(folder)
    shutil.copytree(folder.with_name("step-000000001"), folder)


def link(folder: Path) -> None:
    (folder / SHARD).unlink()
    (folder / SHARD).symlink_to(folder.with_name("step-000000001") / SHARD)


@pytest.mark.parametrize(
    ("tamper", "reason"),
    [
        (lambda f: (f / SHARD).unlink(), f"{SHARD} is missing"),
        (lambda f: (f / manifest.NAME).unlink(), "manifest.json cannot be read: No such file"),
        (
            lambda f: (f / "model/extra.safetensors").touch(),
            "model/extra.safetensors is not listed",
        ),
        (lambda f: shutil.rmtree(f / "optimizer"), "optimizer/shard-00001.safetensors is missing"),
        (swap, "state.json has sha256"),
        (of_another_step, "name says step 2, its manifest step 1"),
        (link, f"{SHARD} is a link"),
        (lambda f: (shutil.rmtree(f), f.touch()), "no such folder"),
    ],
)
def test_a_folder_that_is_not_whole_is_noticed(
    run: Checkpointer, tamper: Callable[[Path], None], reason: str
) -> None:
    tamper(run.folder / "step-000000002")
    assert_refused(run, reason)


def seal(folder: Path) -> None:
    """A manifest to whatever is in the folder, as an attacker would write it."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != manifest.NAME]
    records = {path.relative_to(folder).as_posix(): manifest.record(path) for path in files}
    manifest.write(folder, 2, records)


class Bomb:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.touch, (self.mark,)


def test_pickles_are_never_opened(run: Checkpointer) -> None:
    folder, mark = run.folder / "step-000000002", run.folder / "mark"
    bomb = pickle.dumps(Bomb(mark))
    pickle.loads(bomb)
    mark.unlink()  # the bomb works
    for name in ("model/.metadata", "model/__0_0.distcp", "optimizer/rank.pt"):
        (folder / name).write_bytes(bomb)
        assert_refused(run, "is not listed")
        (folder / name).unlink()
    for name in (SHARD, "state.json"):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(bomb)
        seal(folder)
        with pytest.raises(CheckpointError, match=Path(name).name):
            run.load(folder, tensors())
        (folder / name).write_bytes(content)
    for name in ("model/0_0.distcp", "optimizer/rank.pt"):
        (folder / name).write_bytes(bomb)
    seal(folder)
    run.load(folder, tensors())  # listed, and left alone
    assert not mark.exists()


@pytest.mark.parametrize(
    "name", ["../../mark", "/etc/passwd", "model/../x", "a\\b", "a\nb", "a" * 256]
)
def test_names_that_lead_elsewhere_are_refused(run: Checkpointer, name: str) -> None:
    folder = run.folder / "step-000000002"
    manifest.write(
        folder, 2, {**manifest.read(folder).files, name: manifest.FileRecord(0, "0" * 64)}
    )
    assert_refused(run, "expected a plain relative path")


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "{}",
        '{"version": 2}',
        '{"version": 1, "step": true, "files": {}}',
        "[" * 100_000,
        "\xff",
    ],
)
def test_manifests_that_make_no_sense_are_refused(run: Checkpointer, text: str) -> None:
    (run.folder / "step-000000002" / manifest.NAME).write_bytes(text.encode("latin-1"))
    assert_refused(run, "manifest.json (has version|needs a step|gives no size|is not valid JSON)")


def header(claims: object) -> bytes:
    text = json.dumps(claims).encode()
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize(
    "content",
    [
        b"",
        struct.pack("<Q", 10 << 40) + b"{}",
        header({"weight": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 4 << 40]}}),
        header({"weight": {"dtype": "F32", "shape": [1 << 62, 4], "data_offsets": [0, 0]}}),
        header({"weight": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}) + b"1234",
        struct.pack("<Q", 100_000) + b"[" * 100_000,
    ],
    ids=["empty", "long header", "10 TB", "overflow", "negative", "deep"],
)
def test_absurd_headers_are_refused(run: Checkpointer, content: bytes) -> None:
    folder = run.folder / "step-000000002"
    (folder / SHARD).write_bytes(content)
    seal(folder)
    with pytest.raises(CheckpointError, match=r"shard-00001\.safetensors: not a whole safetensors"):
        run.load(folder, tensors())


@pytest.mark.parametrize(
    ("slices", "reason"),
    [
        ("[" * 100_000, "cannot read DCP_SHARDING_INFO"),
        ('{"weight": 3}', "cannot read DCP_SHARDING_INFO"),
        (json.dumps({"weight": {OFFSETS_KEY: [1 << 40, 0]}}), "hold 12 elements, shape"),
        (json.dumps({"weight": {OFFSETS_KEY: [-1, 0]}}), "expected integers >= 0"),
        (json.dumps({"weight": {OFFSETS_KEY: [0.5, 0]}}), "expected integers >= 0"),
        (json.dumps({"weight": {OFFSETS_KEY: [0]}}), "shape .3, 4. at offsets .0,"),
    ],
)
def test_absurd_slices_are_refused(tmp_path: Path, slices: str, reason: str) -> None:
    file = tmp_path / "shard.safetensors"
    save_file({"weight": torch.ones(3, 4)}, file, metadata={SLICES_KEY: slices})
    with pytest.raises(UserError, match=reason):
        read_tensors(tmp_path)


def write_slices(folder: Path, *slices: tuple[int, Tensor]) -> None:
    for number, (offset, tensor) in enumerate(slices):
        info = json.dumps({"weight": {OFFSETS_KEY: [offset, 0]}})
        save_file({"weight": tensor}, folder / f"{number}.safetensors", metadata={SLICES_KEY: info})


def test_slices_must_make_up_the_tensor(tmp_path: Path) -> None:
    row = torch.ones(1, 4)
    write_slices(tmp_path, (2, row * 3), (0, row), (1, row * 2), (3, row[:0]))
    assert read_tensors(tmp_path)["weight"][:, 0].tolist() == [1, 2, 3]
    write_slices(tmp_path, (2, row), (0, row), (0, row))
    with pytest.raises(
        UserError, match=r"slices of weight hold 12 elements, shape \(3, 4\) has 12"
    ):
        tensor_index(tmp_path)
    write_slices(tmp_path, (2, row), (0, row), (3, row[:0]))
    with pytest.raises(UserError, match=r"hold 8 elements, shape \(3, 4\) has 12"):
        tensor_index(tmp_path)
    write_slices(tmp_path, (2, row), (0, row), (1, row.double()))
    with pytest.raises(UserError, match=r"weight is torch.float64 .* another file torch.float32"):
        tensor_index(tmp_path)


def test_a_checkpoint_of_another_model_is_named_as_such(run: Checkpointer) -> None:
    wanted = tensors()
    wanted["model"] |= {"weight": torch.zeros(5, 4), "bias": torch.zeros(3).half()}
    wanted["model"] |= {f"new{i}": torch.zeros(i) for i in range(2)}
    with pytest.raises(CheckpointError) as caught:
        run.load(run.folder / "step-000000002", wanted)
    assert str(caught.value) == (
        f"checkpoint {run.folder}/step-000000002: model: checkpoint of another model: "
        "new0 (0,) is missing; new1 (1,) is missing; weight is (3, 4), expected (5, 4); and 1 more"
    )
    assert not any(tensor.any() for tensor in wanted["model"].values())
    with pytest.raises(CheckpointError, match=r"optimizer: .*weight.step \(\) is not expected"):
        run.load(run.folder / "step-000000002", {"optimizer": {}})
    assert run.load(run.folder / "step-000000002", {"optimizer": tensors()["optimizer"]})
