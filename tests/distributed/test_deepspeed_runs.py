"""DeepSpeed under the commands as they are typed."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

pytest.importorskip(
    "deepspeed", reason="DeepSpeed is not installed: pip install 'rondo[deepspeed]'"
)

from rondo.tests.forks import Training

ROOT = Path(__file__).parents[2]
ZERO = ["--parallel.engine", "deepspeed", "--parallel.deepspeed.zero_stage", "3"]
SMALL = [
    "--model.dim=16",
    "--model.num_layers=2",
    "--model.pattern=[gated_deltanet, attention]",
    "--data.sequence_length=16",
    "--data.micro_batch_size=2",
    "--evals.batches=0",
    "--logging.tensorboard=false",
    "--data.folder=data",
    "--data.sources.0.path=text.txt",
]
LONG = ["tiny", *SMALL, *ZERO, "--steps=40", "--checkpoint.every=4"]


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A rank of no launcher, in a folder with a text."""
    for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE", "DS_ACCELERATOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PYTHONPATH", str(ROOT / ".typing"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    text = "".join(f"the number {i} has square {i * i} and cube {i**3}\n\n" for i in range(2000))
    (tmp_path / "text.txt").write_text(text)


def two_ranks(folder: Path) -> subprocess.Popen:
    """The run "killed" under torchrun."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [sys.executable, *launcher, "-m", "rondo.pretrain"]
    return subprocess.Popen([*command, *LONG, "--name=killed"], cwd=folder)


def losses(folder: Path, name: str) -> list[float]:
    path = folder / "runs" / name / "metrics.jsonl"
    return [json.loads(line)["loss"] for line in path.open()] if path.exists() else []


def test_one_process_trains_as_without_deepspeed(tmp_path: Path) -> None:
    words = ["tiny", "--steps=6", *SMALL]
    codes, output = Training(tmp_path, 1, *words, "--name=native").end()
    assert codes == [0], output
    command = [sys.executable, "-m", "rondo.launch.cli", "train", *words, "--name=zero", *ZERO]
    assert subprocess.run(command, cwd=tmp_path, timeout=120).returncode == 0
    found, expected = losses(tmp_path, "zero"), losses(tmp_path, "native")
    assert len(found) == 6
    assert found == pytest.approx(expected, abs=1e-5)


@pytest.mark.slow
def test_a_rank_is_killed_and_the_run_goes_on(tmp_path: Path) -> None:
    """With SIGKILL, in mid-run: torchrun ends the other rank, and the run started again ends with
    the losses of one that nothing happened to, to the last bit."""
    codes, output = Training(tmp_path, 2, *LONG, "--name=straight").end()
    assert codes == [0, 0], output
    launcher = two_ranks(tmp_path)
    metrics = tmp_path / "runs/killed/metrics.jsonl"
    deadline = time.monotonic() + 100
    while not metrics.exists() or metrics.read_text().count("\n") < 10:
        assert launcher.poll() is None and time.monotonic() < deadline, "the run made no progress"
        time.sleep(0.01)
    ranks = {rank.environ()["RANK"]: rank for rank in psutil.Process(launcher.pid).children()}
    ranks["1"].kill()
    assert launcher.wait(60) != 0
    assert not any(rank.is_running() for rank in ranks.values())
    before = losses(tmp_path, "killed")
    assert 10 <= len(before) < 40
    assert two_ranks(tmp_path).wait(200) == 0
    found, expected = losses(tmp_path, "killed"), losses(tmp_path, "straight")
    assert len(found) == 40 and found == expected
    assert found[: len(before)] == before
