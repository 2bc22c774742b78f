"""Whole runs of the tiny recipe, from the command line.

But for torchrun, ranks are forks that need not import first."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch

from rondo.errors import UserError
from rondo.goodput import ATTEMPTS, LOST, read_goodput
from rondo.launch.cli import main as run_rondo
from rondo.parallel.build import ParallelModel
from rondo.pretrain import load_recipe, train
from rondo.pretrain.train import Trainer
from rondo.tests.forks import Training, environment

STEPS = 20
SMALL = ["--model.dim=32", "--data.sequence_length=64", "--data.micro_batch_size=2"]
SMALL += ["--checkpoint.every=4", f"--steps={STEPS}", "--evals.batches=1"]
SMALL += ["--logging.tensorboard=false"]
UNTIL_A_SIGNAL = ["--steps=10000", "--checkpoint.every=0"]


def start(folder: Path, ranks: int, *options: str) -> Training:
    return Training(folder, ranks, "tiny", *SMALL, *options)


def finish(training: Training, code: int = 0) -> str:
    codes, output = training.end()
    assert set(codes) == {code}, output
    return output


def run(folder: Path, ranks: int, *options: str, code: int = 0) -> str:
    return finish(start(folder, ranks, *options), code)


def losses(folder: Path, name: str = "tiny") -> list[tuple[int, float, float]]:
    lines = (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
    return [(r["step"], r["loss"], r["grad_norm"]) for r in map(json.loads, lines)]


def digest(output: str) -> str:
    return re.search(r"model digest after step \d+: (\w{64})", output)[1]


def wait_for(ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not ready():
        assert time.monotonic() < deadline, "the run made no progress"
        time.sleep(0.01)


def wait_for_rows(folder: Path, count: int) -> None:
    path = folder / "runs" / "tiny" / "metrics.jsonl"
    wait_for(lambda: path.exists() and len(path.read_text().splitlines()) >= count)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared once: the embedded corpus as bytes."""
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, data: Path) -> dict[int, tuple[Path, str]]:
    """Uninterrupted runs on one and on two ranks."""
    runs = {}
    for ranks in (1, 2):
        folder = tmp_path_factory.mktemp(f"straight{ranks}")
        runs[ranks] = folder, run(folder, ranks, f"--data.folder={data}")
    return runs


@pytest.mark.parametrize(
    ("ranks", "precision"),
    [
        (1, "float32"),
        (2, "float32"),
        pytest.param(2, "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_killed_and_resumed_equals_uninterrupted(
    ranks: int, precision: str, straight: dict, data: Path, tmp_path: Path
) -> None:
    options = [f"--data.folder={data}", f"--precision={precision}"]
    if precision == "float32":
        folder, output = straight[ranks]
    else:
        folder = tmp_path / "straight"
        folder.mkdir()
        output = run(folder, ranks, *options)
    process = start(tmp_path, ranks, *options)
    wait_for(lambda: (tmp_path / "runs/tiny/checkpoints/step-000000008").exists())
    process.kill()
    assert len(losses(tmp_path)) < STEPS
    resumed = run(tmp_path, ranks, *options)
    assert "going on after step" in resumed
    assert losses(tmp_path) == losses(folder)
    assert [step for step, *_ in losses(tmp_path)] == list(range(STEPS))
    assert digest(resumed) == digest(output)
    time_is_told(tmp_path / "runs/tiny")


def time_is_told(run: Path) -> None:
    """Of a run that was killed once, with nothing but its own records."""
    found = read_goodput(run)
    assert found is not None
    assert found.kept + sum(found.lost.values()) == pytest.approx(found.wall)
    first, second, end = map(json.loads, (run / ATTEMPTS).read_text().splitlines())
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert found.wall == pytest.approx(end["time"] - first["time"])
    times = [row["time"] for row in rows]
    assert times == sorted(times) and times[second["step"]] > second["time"] > first["time"]
    assert second["step"] % 4 == 0 and [row["step"] for row in second["redone"]] == list(
        range(second["step"], second["step"] + len(second["redone"]))
    )
    assert found.lost["start-up"] > 1  # twice, the import of torch included
    assert found.lost["save stalls"] > 0 and found.lost["evaluation stalls"] > 0
    assert (found.lost["redone steps"] > 0) == bool(second["redone"])
    assert found.lost["idle between jobs"] > 0
    assert found.lost[LOST[-1]] < 0.2 * found.wall


def test_two_ranks_equal_one(straight: dict) -> None:
    one, two = losses(straight[1][0]), losses(straight[2][0])
    for (step, loss, norm), (_, other_loss, other_norm) in zip(one, two, strict=True):
        assert other_loss == pytest.approx(loss, rel=1e-5), step
        assert other_norm == pytest.approx(norm, rel=1e-3), step


def test_other_layouts_and_micro_batches_equal_one(
    straight: dict, data: Path, tmp_path: Path
) -> None:
    """Replicas instead of shards, recomputed activations, no accumulation."""
    run(
        tmp_path,
        2,
        f"--data.folder={data}",
        "--parallel.dp_replicate=2",
        "--parallel.activation_checkpointing=full",
        "--data.micro_batch_size=4",
    )
    for (_, loss, _), (_, other, _) in zip(losses(straight[1][0]), losses(tmp_path), strict=True):
        assert other == pytest.approx(loss, rel=1e-5)


@pytest.mark.slow
def test_resume_on_another_number_of_ranks(straight: dict, data: Path, tmp_path: Path) -> None:
    run(tmp_path, 2, f"--data.folder={data}", "--steps=8", "--schedule.name=constant")
    run(tmp_path, 1, f"--data.folder={data}", "--steps=12", "--schedule.name=constant")
    other = tmp_path / "other"
    other.mkdir()
    run(other, 1, f"--data.folder={data}", "--steps=12", "--schedule.name=constant")
    for (_, loss, _), (_, expected, _) in zip(losses(tmp_path), losses(other), strict=True):
        assert loss == pytest.approx(expected, rel=1e-5)


def test_a_signal_saves_and_exits_75(data: Path, tmp_path: Path) -> None:
    process = start(tmp_path, 1, *UNTIL_A_SIGNAL, f"--data.folder={data}")
    wait_for_rows(tmp_path, 3)
    os.kill(process.ranks[0].pid, signal.SIGTERM)
    check_that_it_stopped(tmp_path, finish(process, code=75))


def test_a_signal_to_one_rank_of_torchrun_saves_and_ends_all(data: Path, tmp_path: Path) -> None:
    """All ranks stop after the same step, with one checkpoint."""
    words = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "rondo.pretrain"]
    words += ["tiny", *SMALL, *UNTIL_A_SIGNAL, f"--data.folder={data}"]
    process = subprocess.Popen(
        [sys.executable, "-m", *words],
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    wait_for_rows(tmp_path, 3)
    workers = [child.pid for child in psutil.Process(process.pid).children()]
    assert len(workers) == 2
    os.kill(workers[-1], signal.SIGUSR1)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 1, output  # torchrun has a code of its own
    assert output.count("exitcode  : 75") >= 1
    check_that_it_stopped(tmp_path, output)


def check_that_it_stopped(folder: Path, output: str) -> None:
    step = int(re.search(r"stopped by a signal after step (\d+)", output)[1])
    saved = [path.name for path in (folder / "runs/tiny/checkpoints").glob("step-*")]
    assert saved == [f"step-{step:09d}"]
    assert len(losses(folder)) == step


def test_seven_mixers_and_both_optimizers_train(data: Path, tmp_path: Path) -> None:
    """tiny has seven; Muon brings its loss down as AdamW does."""
    for optimizer in ("adamw", "muon"):
        name = f"--name={optimizer}"
        options = [f"--optimizer.name={optimizer}", "--optimizer.lr=3e-3", name]
        run(tmp_path, 1, f"--data.folder={data}", *options)
        values = [loss for _, loss, _ in losses(tmp_path, optimizer)]
        assert values[0] == pytest.approx(5.55, abs=0.1)  # ln 257
        assert values[-1] < values[0] - 0.5


def test_a_run_leaves_what_the_design_says(data: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(
        tmp_path,
        1,
        f"--data.folder={data}",
        "--logging.tensorboard=true",
        "--logging.norms_every=6",
        "--evals.every=6",
        "--precision=bfloat16",
        "--steps=12",
        "--checkpoint.keep=2",
    )
    folder = tmp_path / "runs" / "tiny"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for key in ("step", "loss", "grad_norm", "lr", "tokens", "tokens_per_second", "mfu"):
        assert key in rows[0]
    assert "validation/bits_per_byte" in rows[5] and "validation/bits_per_byte" in rows[11]
    assert rows[11]["state_rms/00"] > 0 and rows[11]["activation_rms/06"] > 0
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == [
        "step-000000008",
        "step-000000012",
    ]
    for part in ("model", "optimizer"):
        assert list((folder / "checkpoints/step-000000012" / part).glob("*.safetensors"))
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    scalars = events.Scalars("train/loss")
    assert [s.step for s in scalars] == list(range(12))
    assert [s.value for s in scalars] == pytest.approx([r["loss"] for r in rows], rel=1e-6)
    assert "validation/bits_per_byte" in events.Tags()["scalars"]


def test_generate_reads_the_run(
    straight: dict, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = straight[2]
    monkeypatch.chdir(folder)
    words = ["generate", "runs/tiny", "--prompt", "The ", "--max_tokens", "8"]
    assert run_rondo(words) == 0
    assert capsys.readouterr().out.startswith("The ")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--model.dims=8"], ["model.dims", "model.dim"]),
        (["--data.sequence_length=0"], ["data.sequence_length", "0"]),
        (["--optimizer.lr=nan"], ["optimizer.lr", "nan"]),
        (["--data.sources", "[{path: no/such/file.txt}]"], ["no/such/file.txt"]),
        (["--model.vocab_size=100"], ["100", "vocab"]),
        (["--parallel.dp_shard=3"], ["parallel.dp_shard", "3"]),
        (["--checkpoint.resume=no/such/checkpoint"], ["checkpoint.resume: ", "no/such/checkpoint"]),
    ],
)
def test_bad_input_is_one_clear_message(
    options: list[str], words: list[str], data: Path, tmp_path: Path
) -> None:
    output = run(tmp_path, 1, f"--data.folder={data}", *options, code=2)
    assert "Traceback" not in output
    for word in words:
        assert word in output


def test_checkpoint_of_another_model_is_refused(straight: dict, data: Path, tmp_path: Path) -> None:
    checkpoint = straight[1][0] / f"runs/tiny/checkpoints/step-{STEPS:09d}"
    output = run(
        tmp_path, 1, f"--data.folder={data}", f"--checkpoint.resume={checkpoint}", "--model.dim=64",
        code=2,
    )  # fmt: skip
    assert "Traceback" not in output and "embedding.weight" in output
    assert not (tmp_path / "runs").exists()


def test_truncated_tokens_are_refused(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "text.txt").write_text("one document\n" * 500)
    (corpus / "more.txt").write_text("another document\n" * 500)
    options = ["--data.sources", f"[{{path: {corpus}}}]", "--data.folder=prepared"]
    options += ["--data.validation_fraction=0", "--evals.batches=0", "--schedule.warmup_steps=0"]
    run(tmp_path, 1, *options, "--steps=1")
    [tokens] = (tmp_path / "prepared").glob("*/train.bin")
    tokens.write_bytes(tokens.read_bytes()[:-7])
    output = run(tmp_path, 1, *options, "--steps=2", code=2)
    assert "train.bin" in output and "Traceback" not in output


def in_process(folder: Path, data: Path, *options: str) -> list[dict]:
    """Runs the tiny recipe in this process; its rows."""
    options = (*SMALL, f"--data.folder={data}", f"--output_dir={folder}/runs", *options)
    assert train(load_recipe("tiny", [*options, "--model.pattern=[attention]"])) == 0
    lines = (folder / "runs" / "tiny" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_a_run_with_damaged_checkpoints_alone_is_refused(data: Path, tmp_path: Path) -> None:
    """And nothing of it is changed, whatever it is told to begin with."""
    plain = "--schedule.name=constant", "--schedule.warmup_steps=0"
    in_process(tmp_path, data, "--steps=2", "--checkpoint.every=1", *plain)
    run, other = tmp_path / "runs" / "tiny", tmp_path / "other"
    shutil.copytree(run, other)
    checkpoints = sorted((run / "checkpoints").iterdir())
    for checkpoint in checkpoints:
        os.truncate(checkpoint / "state.json", 9)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for key in ("resume", "init_from"):
        with pytest.raises(UserError, match=r"none of the 2 checkpoint\(s\) in .*/checkpoints is"):
            in_process(tmp_path, data, "--steps=2", f"--checkpoint.{key}={other}", *plain)
    with pytest.raises(UserError, match=r"^checkpoint\.resume: none of the 2 checkpoint"):
        in_process(tmp_path, data, "--steps=4", *plain)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    for checkpoint in checkpoints:
        shutil.rmtree(checkpoint)
    assert len(in_process(tmp_path, data, "--steps=2", *plain)) == 2


def spoil(monkeypatch: pytest.MonkeyPatch, first: int, last: int) -> None:
    """Makes the gradients of steps `first` to `last` not finite."""
    step, loss = Trainer.step, ParallelModel._loss

    def spoiled(self: Trainer, number: int, batches: list) -> tuple:
        self.model.spoil = first <= number <= last
        return step(self, number, batches)

    def spoiled_loss(self: ParallelModel, batch) -> torch.Tensor:
        value = loss(self, batch)
        return value * float("nan") if getattr(self, "spoil", False) else value

    monkeypatch.setattr(Trainer, "step", spoiled)
    monkeypatch.setattr(ParallelModel, "_loss", spoiled_loss)


def test_a_step_with_bad_gradients_changes_nothing(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    constant = "--schedule.name=constant"
    spoil(monkeypatch, 4, 5)
    rows = in_process(tmp_path, data, constant, "--steps=12")
    assert [row["skipped_steps"] for row in rows] == [0] * 4 + [1] + [2] * 7
    assert rows[4]["loss"] is None and rows[6]["loss"] > 0
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.3


def test_too_many_bad_steps_end_the_run(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, 2, 99)
    with pytest.raises(UserError, match="not finite in 3 steps in a row"):
        in_process(tmp_path, data, "--optimizer.max_skipped_steps=2")
