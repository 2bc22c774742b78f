"""Engines train alike, and go on from each other's checkpoints."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip(
    "deepspeed", reason="DeepSpeed is not installed: pip install 'rondo[deepspeed]'"
)

from rondo.errors import UserError
from rondo.models import Decoder, ModelConfig
from rondo.models.loading import read_tensors
from rondo.parallel.config import DeepSpeedOptions
from rondo.tests.conftest import every_test, slow_but
from rondo.tests.distributed.engine_cases import Rows, adapters, on_disk, scenarios
from rondo.tests.distributed.spawn import run_ranks

CORE = (2, 3)
"""Stages of ZeRO; the first is of the same class as the second."""
BUILD_READER = (
    'python -c "from deepspeed.ops.op_builder import AsyncIOBuilder; AsyncIOBuilder().load()"'
)
"""As parallel/README.md has it."""


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Rows]:
    folder = tmp_path_factory.mktemp("engines")
    write_text(folder)
    stages = (1, 2, 3) if every_test() else CORE
    return run_ranks(scenarios, 2, str(folder), stages, timeout=240)[0]


def write_text(folder: Path) -> None:
    text = "".join(f"the number {i} has square {i * i} and cube {i**3}\n\n" for i in range(2000))
    (folder / "text.txt").write_text(text)


def tensors(folder: Path, name: str) -> dict[str, torch.Tensor]:
    """What the checkpoint of step 10 of the run `name` holds, by part and name."""
    path = folder / f"runs/{name}/checkpoints/step-000000010"
    return {
        f"{part}/{key}": tensor
        for part in ("model", "optimizer")
        for key, tensor in read_tensors(path / part).items()
    }


def losses(rows: Rows) -> list[float]:
    return [row["loss"] for row in rows]


def validation(rows: Rows) -> dict[str, float]:
    """Losses of the held-out text, by step and name."""
    named = ((row["step"], key, value) for row in rows for key, value in row.items())
    found = {f"{step} {key}": x for step, key, x in named if key.startswith("validation/")}
    assert found
    return found


@pytest.mark.parametrize("stage", slow_but(CORE, (1, 2, 3)))
def test_zero_trains_as_fsdp2_does_killed_and_started_again(
    rows: dict[str, Rows], stage: int
) -> None:
    expected, found = rows["native"], rows[f"zero {stage}"]
    assert [row["step"] for row in found] == list(range(20))
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.keys() == theirs.keys()
    assert losses(found) == pytest.approx(losses(expected), abs=1e-4)
    assert validation(found) == pytest.approx(validation(expected), abs=1e-4)
    norms = [[row["grad_norm"] for row in each] for each in (found, expected)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)
    measured = 0
    for mine, theirs in zip(found, expected, strict=True):
        for key in ("router_grad_norm/tokens", "router_grad_norm/auxiliary"):
            if key in theirs:
                measured += 1
                assert mine[key] == pytest.approx(theirs[key], rel=1e-4), (mine["step"], key)
    assert measured == 4
    # What went on is what was killed, to the last bit.
    before = rows[f"before {stage}"]
    assert len(before) == 13 and losses(found)[:13] == losses(before)


@pytest.mark.parametrize("stage", slow_but(CORE, (1, 2, 3)))
def test_zero_clips_as_fsdp2_does(rows: dict[str, Rows], stage: int) -> None:
    found, expected = rows[f"clipped {stage}"], rows["native clipped"]
    assert min(row["grad_norm"] for row in expected) > 0.1
    assert losses(found) == pytest.approx(losses(expected), abs=1e-4)
    assert validation(found) == pytest.approx(validation(expected), abs=1e-4)
    assert abs(losses(expected)[-1] - losses(rows["native unclipped"])[-1]) > 0.01


@pytest.mark.parametrize("stage", slow_but(CORE, (1, 2, 3)))
def test_zero_trains_in_bfloat16_as_fsdp2_does(rows: dict[str, Rows], stage: int) -> None:
    """Both round to bfloat16, but not the same numbers: FSDP2 also casts the scales of norms. Each
    is then as far from the run in float32 as rounding takes it, and they at most twice that from
    each other. DeepSpeed's own keys come from a file here."""
    exact, native, found = (rows[key] for key in ("native", "native bf16", f"zero {stage} bf16"))
    assert len(found) == len(native) == 9
    norms = [[row["grad_norm"] for row in each[:9]] for each in (exact, native, found)]
    for plain, half, ours, limit in (
        (losses(exact)[:9], losses(native), losses(found), 5e-3),
        (*norms, 2e-2),
    ):
        rounding = max(abs(a - b) for a, b in zip(plain, half, strict=True))
        assert 0 < rounding < limit
        assert ours == pytest.approx(half, abs=2 * rounding)


@pytest.mark.parametrize("stage", slow_but(CORE, (1, 2, 3)))
def test_weighted_samples_bad_gradients_and_a_signal(rows: dict[str, Rows], stage: int) -> None:
    """Samples count by their losses; a step with bad gradients changes nothing; after a signal to
    one rank all save what they have and stop. Stages 2 and 3 offload to the host."""
    found, expected = rows[f"spoiled {stage}"], rows["spoiled native"]
    for each in (found, expected):
        assert [row["skipped_steps"] for row in each] == [0, 1, 1, 1, 1]
    weights = [[row["reweight/largest_weight"] for row in each] for each in (found, expected)]
    assert weights[0] == pytest.approx(weights[1], abs=1e-4) and min(weights[0]) > 1.001
    assert losses(found) == pytest.approx(losses(expected), abs=1e-4)


@pytest.mark.parametrize("stage", slow_but(CORE, (1, 2, 3)))
@pytest.mark.parametrize("key", ["{} to native", "native to {}"])
def test_a_checkpoint_goes_on_under_another_engine(
    rows: dict[str, Rows], key: str, stage: int
) -> None:
    found = rows[key.format(stage)]
    assert [row["step"] for row in found] == list(range(10, 20))
    assert losses(found) == pytest.approx(losses(rows["native"])[10:], abs=1e-4)


@pytest.mark.slow
def test_adapters_train_as_under_fsdp2(tmp_path: Path) -> None:
    """What is frozen has no optimizer state, and stands in checkpoints as it was."""
    write_text(tmp_path)
    rows = run_ranks(adapters, 2, str(tmp_path), timeout=240)[0]
    expected, saved = rows["native"], tensors(tmp_path, "native")
    assert losses(expected)[0] - losses(expected)[-1] > 0.05
    assert all(".lora_" in name for name in saved if name.startswith("optimizer/"))
    for stage in (1, 2, 3):
        for key, first in ((f"zero {stage} to native", 0), (f"native to {stage}", 10)):
            found = rows[key]
            assert [row["step"] for row in found] == list(range(first, 20))
            assert losses(found) == pytest.approx(losses(expected)[first:], abs=1e-4)
            norms = [[row["grad_norm"] for row in each] for each in (found, expected[first:])]
            assert norms[0] == pytest.approx(norms[1], rel=1e-3)
        ours = tensors(tmp_path, f"zero{stage}")
        assert ours.keys() == saved.keys()
        for name, tensor in saved.items():
            if ".lora_" in name:
                torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=1e-4)
            else:
                assert ours[name].equal(tensor), name


@pytest.mark.slow
def test_parameters_and_optimizer_state_on_a_disk(tmp_path: Path) -> None:
    if missing := disk_reader_missing():
        pytest.skip(missing)
    write_text(tmp_path)
    rows = run_ranks(on_disk, 2, str(tmp_path), timeout=240)[0]
    for key, first in (("disk", 0), ("to disk", 3), ("from disk", 3)):
        assert [row["step"] for row in rows[key]] == list(range(first, 6))
        assert losses(rows[key]) == pytest.approx(losses(rows["native"])[first:], abs=1e-4)
    written = {file.parts[-3] for file in (tmp_path / "disk").rglob("*.swp")}
    assert written == {"float32params", "optimizer"}


def disk_reader_missing() -> str | None:
    """Why DeepSpeed's reader cannot be used here; where nobody has compiled it for this environment
    it would take minutes."""
    from deepspeed.ops.op_builder import AsyncIOBuilder
    from torch.utils.cpp_extension import _get_build_directory

    if not AsyncIOBuilder().is_compatible(verbose=False):
        return "libaio is not installed: apt-get install libaio-dev"
    folder = Path(_get_build_directory("async_io", verbose=False))
    rules, here = folder / "build.ninja", str(Path(torch.__file__).parent)
    if not (folder / "async_io.so").is_file() or here not in rules.read_text("utf-8"):
        return (
            "DeepSpeed's async_io is not compiled here, which takes minutes: DS_ACCELERATOR=cpu "
            f"PATH={Path(sys.executable).parent}:$PATH {BUILD_READER}"
        )
    if (folder / "lock").exists():
        return f"DeepSpeed's async_io is being compiled, or {folder}/lock was left behind"
    return None


@pytest.mark.parametrize("key", ["offload_optimizer", "offload_parameters"])
def test_a_disk_that_deepspeed_cannot_read_is_refused(
    monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from deepspeed.ops.op_builder import AsyncIOBuilder

    from rondo.parallel.engines.disk import check_reader

    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda self, verbose=False: False)
    check_reader(DeepSpeedOptions(3, **{key: "cpu"}))
    with pytest.raises(UserError, match=rf"deepspeed.{key}: nvme needs libaio .*libaio-dev"):
        check_reader(DeepSpeedOptions(3, **{key: "nvme"}, nvme_folder="/x"))


def test_memory_that_cannot_be_locked_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from rondo.parallel.engines import disk

    with torch.device("meta"):
        part = Decoder(ModelConfig(vocab_size=4096, dim=1024, num_layers=2, pattern=["attention"]))
    nvme = {"offload_parameters": "nvme", "offload_optimizer": "nvme", "nvme_folder": "/x"}
    found = disk.read_buffers(part, 2)
    large = [p for p in part.blocks["0"].parameters() if p.numel() >= 2**19]
    assert found == {"buffer_count": len(large) + 2, "buffer_size": part.output_weight.numel() // 2}
    need = 4 * found["buffer_count"] * found["buffer_size"]
    need += 4 * 4 * sum(param.numel() for param in part.parameters()) // 2
    monkeypatch.setattr(disk, "_may_lock", lambda: False)
    for limit in (need, disk.resource.RLIM_INFINITY):
        monkeypatch.setattr(disk.resource, "getrlimit", lambda kind, limit=limit: (limit, limit))
        disk.check_locked_memory(part, 2, DeepSpeedOptions(3, **nvme))
    monkeypatch.setattr(disk.resource, "getrlimit", lambda kind: (need - 1, need))
    disk.check_locked_memory(part, 2, DeepSpeedOptions(3, offload_optimizer="cpu"))
    with pytest.raises(UserError, match=f"nvme locks {need:,} bytes .*limit is {need - 1:,}"):
        disk.check_locked_memory(part, 2, DeepSpeedOptions(3, **nvme))
    monkeypatch.setattr(disk, "_may_lock", lambda: True)
    disk.check_locked_memory(part, 2, DeepSpeedOptions(3, **nvme))
