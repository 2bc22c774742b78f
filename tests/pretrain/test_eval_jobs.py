"""Checkpoints that are scored while a run trains, with a stand-in for `rondo eval`."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from rondo.errors import UserError
from rondo.launch.options import parse_watch
from rondo.parallel.checkpoint import Checkpointer, files
from rondo.parallel.mesh import process_group
from rondo.parallel.signals import StopFlag
from rondo.pretrain import load_recipe, train
from rondo.pretrain.eval_jobs import EvalJobs

ROOT = Path(__file__).parents[2]
SMALL = ["--model.dim=16", "--model.num_layers=1", "--model.pattern=[attention]"]
SMALL += ["--data.sequence_length=32", "--data.global_batch_size=2", "--data.micro_batch_size=2"]
SMALL += ["--evals.batches=0", "--logging.tensorboard=false", "--logging.norms_every=0"]
SMALL += ["--steps=6", "--checkpoint.every=1", "--checkpoint.keep=1", "--evals.every=2"]


@pytest.fixture
def control(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Steers the stand-in."""
    path = tmp_path / "control"
    path.mkdir()
    fake = ROOT / "tests" / "launch" / "fake_eval.py"
    monkeypatch.setenv("RONDO_EVAL_COMMAND", f"{sys.executable} -S {fake}")
    monkeypatch.setenv("RONDO_FAKE_EVAL", str(path))
    monkeypatch.setenv("PYTHONPATH", str(ROOT / ".typing"))
    return path


def run(tmp_path: Path, *overrides: str) -> Path:
    places = [f"--output_dir={tmp_path}/runs", f"--data.folder={tmp_path}/data"]
    assert train(load_recipe("tiny", [*SMALL, "--evals.tasks=[a]", *places, *overrides])) == 0
    return tmp_path / "runs" / "tiny"


def starts(control: Path) -> list[int]:
    return [int(line) for line in (control / "starts").read_text().split()]


def lost(folder: Path) -> list[float]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["eval_seconds"] for line in lines]


def steps(folder: Path) -> list[int]:
    return sorted(files.steps(folder / "checkpoints"))


def test_beside_training(tmp_path: Path, control: Path) -> None:
    """Slower than training is; what is held stays although the run keeps one checkpoint."""
    (control / "wait").touch()
    seen: list[list[int]] = []

    def release() -> None:
        rows = tmp_path / "runs" / "tiny" / "metrics.jsonl"
        deadline = time.monotonic() + 60
        while not rows.exists() or len(rows.read_text().splitlines()) < 6:
            if time.monotonic() > deadline:
                break
            time.sleep(0.05)
        time.sleep(0.5)  # the last checkpoint
        seen.append(steps(tmp_path / "runs" / "tiny"))
        (control / "wait").unlink()

    thread = threading.Thread(target=release)
    thread.start()
    folder = run(tmp_path)
    thread.join()
    assert seen == [[2, 4, 6]]
    assert starts(control) == [2, 4, 6]
    assert max(lost(folder)) < 0.5  # the time it takes to start a process, once
    run(tmp_path)  # there is nothing left to score
    assert starts(control) == [2, 4, 6]


def test_in_the_loop(tmp_path: Path, control: Path) -> None:
    folder = run(tmp_path, "--evals.where=loop", "--evals.every=3")
    assert starts(control) == [3, 6]
    assert [seconds > 0.05 for seconds in lost(folder)][1:] == [False, False, True, False, False]
    results = json.loads((folder / "evals" / "step-000000003" / "a.json").read_text())
    assert results["results"]["a"]["acc,none"] == 0.5


def test_a_checkpoint_for_scoring_alone_is_time_lost(
    tmp_path: Path, control: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = Checkpointer.save

    def slow(self: Checkpointer, *given: Any) -> None:
        time.sleep(0.6)
        save(self, *given)

    monkeypatch.setattr(Checkpointer, "save", slow)
    folder = run(tmp_path, "--steps=6", "--checkpoint.every=4")  # scored: 2, 4 and 6
    assert [seconds > 0.5 for seconds in lost(folder)] == [False, False, True, False, False, False]


def test_local_files_are_handed_on(
    tmp_path: Path, control: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "given").mkdir()
    (tmp_path / "given" / "a text.txt").write_text("A text.\n")
    monkeypatch.chdir(tmp_path)
    local = ["--evals.data_dir=given", "--evals.text=given/a text.txt"]
    run(
        tmp_path,
        "--steps=2",
        "--schedule.warmup_steps=0",
        "--evals.samples=7",
        "--evals.seed=3",
        *local,
    )
    given = json.loads((control / "words").read_text())
    assert given[given.index("a") + 1 :] == [
        *("--data_dir", str(tmp_path / "given"), "--text", "given/a text.txt"),
        *("--samples", "7", "--seed", "3"),
    ]


@pytest.mark.quick
def test_options_of_slurm_are_handed_on(tmp_path: Path) -> None:
    slurm = {"partition": "p", "gpus": 2, "cpus": 3, "sbatch": ["--nice=1"], "container": "img"}
    slurm |= {"runtime": "apptainer", "mount": ["/a:/b", "/c"], "python": "/opt/python"}
    words = [f"--evals.slurm={json.dumps(slurm)}", "--evals.where=slurm", "--evals.tasks=[a]"]
    recipe = load_recipe("tiny", words)
    with process_group(recipe.parallel) as ranks, StopFlag([]) as stop:
        command = EvalJobs(recipe, tmp_path, ranks, stop)._command()
    options = vars(parse_watch(command[command.index("watch") + 1 :]))
    assert {key: options[key] for key in slurm} == slurm


@pytest.mark.slow
def test_local_files_are_scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By `rondo eval` itself, without a network."""
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("PYTHONPATH", str(ROOT / ".typing"))
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    (tmp_path / "given").mkdir()
    pairs = [{"sentence_good": "It is.", "sentence_bad": f"{word} is."} for word in ("Be", "Am")]
    lines = "".join(f"{json.dumps(pair)}\n" for pair in pairs)
    (tmp_path / "given" / "causative.jsonl").write_text(lines)
    (tmp_path / "text.txt").write_text("A text.\n")
    monkeypatch.chdir(tmp_path)
    tasks = ("blimp_causative", "bits_per_byte", "parity_12")
    folder = run(
        tmp_path,
        *("--steps=2", "--schedule.warmup_steps=0", "--evals.where=loop"),
        f"--evals.tasks=[{', '.join(tasks)}]",
        *("--evals.data_dir=given", "--evals.text=text.txt", "--evals.samples=3"),
    )
    files_of = {task: folder / "evals" / "step-000000002" / f"{task}.json" for task in tasks}
    found = {task: json.loads(file.read_text()) for task, file in files_of.items()}
    assert [found[task]["n-samples"][task]["original"] for task in tasks] == [2, 1, 3]
    assert found["bits_per_byte"]["results"]["bits_per_byte"]["bits_per_byte,none"] > 0
    assert found["parity_12"]["rondo"]["options"]["data_dir"] == str(tmp_path / "given")
    assert found["parity_12"]["rondo"]["options"]["text"] == str(tmp_path / "text.txt")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--evals.data_dir=nowhere", "evals.data_dir: nowhere is no folder"),
        ("--evals.text=nowhere.txt", "evals.text: 'nowhere.txt': no such file"),
    ],
)
def test_what_is_missing_is_said_before_training(
    tmp_path: Path, override: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        run(tmp_path, override)
    assert not (tmp_path / "runs").exists() and not (tmp_path / "data").exists()


def test_holds_end_by_themselves(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        files.step_folder(tmp_path, step).mkdir()
    files.hold(tmp_path, 1)
    files.hold(tmp_path, 2)
    old = time.time() - files.HOLD_SECONDS - 1
    os.utime(tmp_path / ".step-000000002.hold", (old, old))
    files.prune(tmp_path, 1, 4)
    assert files.steps(tmp_path) == [4, 1]
    files.recover(tmp_path)
    assert files.is_held(tmp_path, 1)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--evals.tasks=[a, a]", 'evals.tasks.1: "a" is there already'),
        ("--evals.tasks=[../a]", "evals.tasks.0: must be the name"),
        ("--evals.where=slrum", "slurm"),
        ("--evals.slurm.time=soon", "D-HH:MM:SS"),
        ("--evals.retries=-1", "evals.retries: must be at least 0"),
        ("--evals.data_dir=", "evals.data_dir: must not be empty"),
        ("--evals.slurm.container=", "evals.slurm.container: must not be empty"),
        ("--evals.slurm.runtime=apptaner", "apptainer"),
    ],
)
def test_what_is_wrong_is_said_before_training(override: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        load_recipe("tiny", [override])
    assert message in str(error.value)
